//! What a person sees while a command runs: a bar on a terminal, a line now and then elsewhere.
//! Everything goes to stderr; stdout is for results.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use dtmem::experiment::run as experiments;
use dtmem::train::run::Event;
use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use tracing::info;

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows events.
#[derive(Debug)]
pub struct Progress {
    bars: MultiProgress,
    terminal: bool,
    current: Option<Current>,
    /// The last metrics of a training.
    metrics: String,
    /// Which run of an experiment it is.
    place: String,
}

/// The phase that is under way.
#[derive(Debug)]
struct Current {
    name: &'static str,
    bar: ProgressBar,
    started: Instant,
    first: u64,
    last_line: Instant,
}

impl Progress {
    /// Sets up bars and the log.
    pub fn new() -> Self {
        let bars = MultiProgress::new();
        let log = bars.clone();
        // A second call in one process changes nothing: the first log stays.
        let _ = tracing_subscriber::fmt()
            .with_writer(move || LogWriter(log.clone()))
            .without_time()
            .with_target(false)
            .with_level(false)
            .try_init();
        Self {
            bars,
            terminal: io::stderr().is_terminal(),
            current: None,
            metrics: String::new(),
            place: String::new(),
        }
    }

    /// Shows an event of a run.
    pub fn show(&mut self, event: Event) {
        match event {
            Event::Demonstrations { done, total } => {
                self.advance("generating", done, total, String::new);
            }
            Event::Evaluation { done, total } => {
                self.advance("evaluating", done, total, String::new);
            }
            Event::Step { step, steps } => {
                let metrics = self.metrics.clone();
                self.advance("training", step, steps, || metrics);
            }
            Event::Metrics(line) => {
                self.metrics = format!(
                    "loss {:.4}  action {:.4}  memory {:.4}  accuracy {:.3}  {:.0} tokens/s",
                    line.loss, line.action_loss, line.memory_loss, line.accuracy, line.tokens_per_s,
                );
            }
        }
    }

    /// Shows an event of an experiment: which run it is, and what that run tells.
    pub fn show_experiment(&mut self, event: experiments::Event) {
        let (number, total, cell, seed, left) = match event {
            experiments::Event::Run(event) => return self.show(event),
            experiments::Event::Cell {
                number,
                total,
                cell,
                seed,
                left,
            } => (number, total, cell, seed, left),
        };
        let left = left.map_or(String::new(), |left| {
            let whole = Duration::from_secs(left.as_secs());
            format!("; about {} left for all", HumanDuration(whole))
        });
        (self.current, self.metrics) = (None, String::new());
        self.place = format!("{number}/{total} ");
        info!(
            "run {number} of {total}: {}: {}, seed {seed}{left}",
            cell.group, cell.name
        );
    }

    fn advance(
        &mut self,
        name: &'static str,
        done: u64,
        total: u64,
        message: impl FnOnce() -> String,
    ) {
        let (bars, place, now) = (&self.bars, &self.place, Instant::now());
        if self
            .current
            .as_ref()
            .is_some_and(|current| current.name != name)
        {
            self.current = None;
        }
        let current = self.current.get_or_insert_with(|| Current {
            name,
            bar: bars.add(
                ProgressBar::new(total)
                    .with_style(style())
                    .with_prefix(format!("{place}{name}")),
            ),
            started: now,
            first: done.saturating_sub(1),
            last_line: now,
        });
        if self.terminal {
            current.bar.set_message(message());
            current.bar.set_position(done);
        } else if now - current.last_line >= LINE_EVERY {
            current.last_line = now;
            let left = current.left(done, total);
            info!("{place}{name} {done}/{total}  {}{left}", message());
        }
        if done >= total {
            current.bar.finish_and_clear();
            self.current = None;
        }
    }
}

impl Current {
    /// How long it will still take.
    fn left(&self, done: u64, total: u64) -> String {
        let share = (total - done.min(total)) as f64 / (done - self.first).max(1) as f64;
        let seconds = self.started.elapsed().as_secs_f64() * share;
        match Duration::try_from_secs_f64(seconds.round()) {
            Ok(left) => format!("  about {} left", HumanDuration(left)),
            Err(_) => String::new(),
        }
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len}  {msg}  {elapsed} (left: {eta})")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Writes log lines above the bars.
struct LogWriter(MultiProgress);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
