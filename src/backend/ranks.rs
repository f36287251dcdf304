//! Ranks: processes, or threads of one, that train a model together, each on its part of a batch.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

/// Which of the ranks this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rank {
    /// From 0, which is the one that writes files.
    pub number: usize,
    /// How many there are.
    pub of: usize,
}

impl Rank {
    /// The only one.
    pub const ALONE: Self = Self { number: 0, of: 1 };

    /// Whether there are no others.
    pub fn is_alone(self) -> bool {
        self.of == 1
    }

    /// Whether this rank writes files, evaluates and sums up.
    pub fn is_first(self) -> bool {
        self.number == 0
    }
}

/// A rank that did not come.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("rank {rank} waited for the others in vain: one of {of} has ended or hangs")]
pub struct Deserted {
    /// The rank that waited.
    pub rank: usize,
    /// How many ranks there are.
    pub of: usize,
}

/// How long ranks wait for each other.
const PATIENCE: Duration = Duration::from_secs(120);

/// Adds up between ranks that are threads of this process, on the host's memory.
#[derive(Debug, Default)]
struct Group {
    round: Mutex<Round>,
    changed: Condvar,
}

/// One sum.
#[derive(Debug, Default)]
struct Round {
    /// What each rank adds, until all have taken the sum.
    parts: Vec<Option<Vec<f32>>>,
    taken: usize,
}

/// One rank of a group of threads.
#[derive(Debug)]
pub struct Member {
    rank: Rank,
    group: Arc<Group>,
}

impl Member {
    /// All members of a group of this size.
    pub fn group(size: usize) -> Vec<Self> {
        let group = Arc::new(Group::default());
        group.lock().parts.resize(size, None);
        let member = |number| Self {
            rank: Rank { number, of: size },
            group: Arc::clone(&group),
        };
        (0..size).map(member).collect()
    }

    /// Which one it is.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Σ over all members, added in the order of the ranks: the same bits for each of them.
    ///
    /// # Errors
    /// One of them does not come.
    pub fn sum(&self, mine: Vec<f32>) -> Result<Vec<f32>, Deserted> {
        let Rank { number, of } = self.rank;
        let group = &*self.group;
        // Not before all have taken the sum of the round before.
        let mut round = self.wait(group.lock(), |round| round.parts[number].is_some())?;
        round.parts[number] = Some(mine);
        group.changed.notify_all();
        let mut round = self.wait(round, |round| round.parts.iter().any(Option::is_none))?;
        let mut parts = round.parts.iter().flatten();
        let mut sum = parts.next().cloned().unwrap_or_default();
        for part in parts {
            for (sum, x) in sum.iter_mut().zip(part) {
                *sum += x;
            }
        }
        round.taken += 1;
        if round.taken == of {
            round.taken = 0;
            round.parts.fill(None);
            group.changed.notify_all();
        }
        Ok(sum)
    }

    fn wait<'a>(
        &'a self,
        round: MutexGuard<'a, Round>,
        condition: impl Fn(&mut Round) -> bool,
    ) -> Result<MutexGuard<'a, Round>, Deserted> {
        let waited = self
            .group
            .changed
            .wait_timeout_while(round, PATIENCE, condition);
        let (round, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        match timeout.timed_out() {
            true => Err(Deserted {
                rank: self.rank.number,
                of: self.rank.of,
            }),
            false => Ok(round),
        }
    }
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_member_has_the_same_sum_round_after_round() {
        const ROUNDS: usize = 50;
        let members = Member::group(3);
        let all: Vec<Vec<Vec<f32>>> = std::thread::scope(|scope| {
            let run = |member: Member| {
                let mine = |round: usize| vec![round as f32 * 0.1, member.rank().number as f32];
                (0..ROUNDS)
                    .map(|round| member.sum(mine(round)).unwrap())
                    .collect()
            };
            let threads: Vec<_> = members
                .into_iter()
                .map(|member| scope.spawn(move || run(member)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
            threads.into_iter().map(join).collect()
        });
        for (round, sum) in all[0].iter().enumerate() {
            let part = round as f32 * 0.1;
            assert_eq!(sum, &[part + part + part, 3.0]);
        }
        assert!(all[1] == all[0] && all[2] == all[0]);
    }
}
