//! Finding the other ranks: the environment variables that launchers of distributed training set,
//! and one exchange over TCP before the GPUs talk among themselves.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::backend::Rank;

/// Bytes that the first rank gives to all others: what NCCL calls a unique id.
pub const ID_BYTES: usize = 128;
/// How long ranks look for each other.
const PATIENCE: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(50);
/// Most ranks of a run.
const MOST_RANKS: usize = 1 << 16;

/// Why ranks do not find each other.
#[derive(Debug, Error)]
pub enum RanksError {
    /// An environment variable that is missing or wrong.
    #[error("environment variable {name}: found {found}, expected {expected}")]
    Variable {
        /// Its name.
        name: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// This binary knows no other ranks.
    #[error(
        "WORLD_SIZE is {of}, but this binary was built without the feature `nccl`: build it with \
         --features nccl, or train with WORLD_SIZE=1"
    )]
    NotBuilt {
        /// How many ranks there are.
        of: usize,
    },
    /// The network.
    #[error(
        "rank {rank} cannot {action} at {address} (MASTER_ADDR and MASTER_PORT): {source}; choose a \
         port that is free on the machine of rank 0 and open to the others"
    )]
    Network {
        /// Of this process.
        rank: usize,
        /// What was tried.
        action: &'static str,
        /// Where.
        address: String,
        /// What the system says.
        source: io::Error,
    },
}

/// What the environment says of this process and the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    /// Which one this is.
    pub rank: Rank,
    /// Number of the GPU of this machine that it uses.
    pub local: usize,
    /// Machine and port of the first.
    pub address: (String, u16),
}

impl Ranks {
    /// From `RANK`, `WORLD_SIZE`, `LOCAL_RANK` (0 if it is not set), `MASTER_ADDR` and `MASTER_PORT`;
    /// nothing where `WORLD_SIZE` is not set, or 1. `variable` gives their values.
    ///
    /// # Errors
    /// A variable that is missing or wrong.
    pub fn from_environment(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, RanksError> {
        let text = |name| variable(name).filter(|value| !value.is_empty());
        let number = |name, found: String, expected: String, most: usize| match found.parse() {
            Ok(number) if number <= most => Ok(number),
            _ => Err(RanksError::Variable {
                name,
                found: format!("`{found}`"),
                expected,
            }),
        };
        let needed = |name| {
            text(name).ok_or(RanksError::Variable {
                name,
                found: "nothing".to_owned(),
                expected: "a value, because WORLD_SIZE is above 1".to_owned(),
            })
        };
        let Some(size) = text("WORLD_SIZE") else {
            return Ok(None);
        };
        let of: usize = number(
            "WORLD_SIZE",
            size,
            format!("a number of ranks, 1 to {MOST_RANKS}"),
            MOST_RANKS,
        )?;
        if of <= 1 {
            return Ok(None);
        }
        let below = format!("a number from 0, below the {of} of WORLD_SIZE");
        let rank = number("RANK", needed("RANK")?, below.clone(), of - 1)?;
        let local = match text("LOCAL_RANK") {
            Some(found) => number("LOCAL_RANK", found, below, of - 1)?,
            None => 0,
        };
        let host = needed("MASTER_ADDR")?;
        let port = needed("MASTER_PORT")?;
        let port: usize = number("MASTER_PORT", port, "a port, 1 to 65535".to_owned(), 65535)?;
        Ok(Some(Self {
            rank: Rank { number: rank, of },
            local,
            address: (host, port as u16),
        }))
    }

    /// The bytes that rank 0 makes, on every rank.
    ///
    /// # Errors
    /// Those of `make`, and ranks that do not find each other within five minutes.
    pub fn share<E: From<RanksError>>(
        &self,
        make: impl FnOnce() -> Result<[u8; ID_BYTES], E>,
    ) -> Result<[u8; ID_BYTES], E> {
        let deadline = Instant::now() + PATIENCE;
        match self.rank.is_first() {
            true => {
                let bytes = make()?;
                self.give(&bytes, deadline)?;
                Ok(bytes)
            }
            false => Ok(self.take(deadline)?),
        }
    }

    /// To all others, each of which says who it is.
    fn give(&self, bytes: &[u8; ID_BYTES], deadline: Instant) -> Result<(), RanksError> {
        let (host, port) = &self.address;
        let listen = || {
            // The address may be one by which only others know this machine.
            let listener = TcpListener::bind((host.as_str(), *port))
                .or_else(|_| TcpListener::bind(("0.0.0.0", *port)))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(self.network("listen"))?;
        let mut waits = vec![true; self.rank.of];
        waits[0] = false;
        while waits.contains(&true) {
            let served = match listener.accept() {
                Ok((stream, _)) => serve(stream, bytes),
                Err(error) => Err(error),
            };
            match served {
                Ok(rank) => {
                    if let Some(waits) = waits.get_mut(rank) {
                        *waits = false;
                    }
                }
                // Somebody else came, or nobody yet.
                Err(error) if Instant::now() > deadline => {
                    return Err(self.network("be found by the others")(error));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
        Ok(())
    }

    fn take(&self, deadline: Instant) -> Result<[u8; ID_BYTES], RanksError> {
        let ask = || {
            let (host, port) = &self.address;
            let none = || io::Error::new(io::ErrorKind::NotFound, "no such machine");
            let address = (host.as_str(), *port).to_socket_addrs()?.next();
            let mut stream =
                TcpStream::connect_timeout(&address.ok_or_else(none)?, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(&greeting(self.rank.number))?;
            let mut bytes = [0; ID_BYTES];
            stream.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        loop {
            match ask() {
                Ok(bytes) => return Ok(bytes),
                // The first rank may not be there yet.
                Err(error) if Instant::now() > deadline => {
                    return Err(self.network("find rank 0")(error));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    fn network(&self, action: &'static str) -> impl Fn(io::Error) -> RanksError {
        let (rank, (host, port)) = (self.rank.number, self.address.clone());
        move |source| RanksError::Network {
            rank,
            action,
            address: format!("{host}:{port}"),
            source,
        }
    }
}

const GREETING: [u8; 4] = *b"dtm1";

fn greeting(rank: usize) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&GREETING);
    bytes[4..].copy_from_slice(&(rank as u32).to_le_bytes());
    bytes
}

/// Gives the bytes to a rank, and says which.
fn serve(mut stream: TcpStream, bytes: &[u8; ID_BYTES]) -> io::Result<usize> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut found = [0; 8];
    stream.read_exact(&mut found)?;
    let [greeting, rank] = [0, 4].map(|start| [0, 1, 2, 3].map(|byte| found[start + byte]));
    if greeting != GREETING {
        return Err(io::Error::other("a stranger"));
    }
    stream.write_all(bytes)?;
    Ok(u32::from_le_bytes(rank) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(values: &[(&str, &str)]) -> Result<Option<Ranks>, RanksError> {
        let values = values.to_vec();
        Ranks::from_environment(|name| {
            let found = values.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    const ALL: [(&str, &str); 5] = [
        ("WORLD_SIZE", "4"),
        ("RANK", "2"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn ranks_come_from_the_environment() {
        assert_eq!(with(&[]).unwrap(), None);
        assert_eq!(with(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), None);
        let found = with(&ALL).unwrap().unwrap();
        assert_eq!((found.rank.number, found.rank.of, found.local), (2, 4, 1));
        assert_eq!(found.address, ("127.0.0.1".to_owned(), 29500));
        for (name, wrong) in [
            ("WORLD_SIZE", "many"),
            ("RANK", "4"),
            ("RANK", ""),
            ("LOCAL_RANK", "-1"),
            ("MASTER_PORT", "70000"),
            ("MASTER_ADDR", ""),
        ] {
            let mut values = ALL;
            for value in values.iter_mut().filter(|(known, _)| *known == name) {
                value.1 = wrong;
            }
            let error = with(&values).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn what_rank_0_makes_reaches_every_rank_in_spite_of_strangers() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = ("127.0.0.1".to_owned(), port.local_addr().unwrap().port());
        drop(port);
        let ranks = |number| Ranks {
            rank: Rank { number, of: 3 },
            local: 0,
            address: address.clone(),
        };
        let made: [u8; ID_BYTES] = std::array::from_fn(|index| index as u8 ^ 0x5a);
        std::thread::scope(|scope| {
            let others: Vec<_> = [2, 1]
                .map(ranks)
                .into_iter()
                .map(|ranks| {
                    scope.spawn(move || ranks.share::<RanksError>(|| unreachable!()).unwrap())
                })
                .collect();
            let stranger = scope.spawn(|| {
                for _ in 0..200 {
                    if let Ok(mut stream) = TcpStream::connect((address.0.as_str(), address.1)) {
                        let _ = stream.write_all(b"GET / HT");
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let first = ranks(0).share::<RanksError>(|| Ok(made)).unwrap();
            assert_eq!(first, made);
            stranger.join().unwrap();
            for other in others {
                assert_eq!(other.join().unwrap(), made);
            }
        });
    }
}
