//! Runs a grid: what is there already is not run again, and what was begun goes on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::info;
use tracing::subscriber::NoSubscriber;

use super::grid::{Base, Cell, Grid};
use super::memory::MemoryTest;
use super::report;
use super::{Error, Experiment, Size};
use crate::backend::Backend;
use crate::tasks::{Task, write_beside};
use crate::train;
use crate::train::config::{Config, ConfigError};
use crate::train::device::{DeviceChoice, Job, Place, run_on};
use crate::train::finetune::Forgetting;
use crate::train::run::{self as runs, Folder, Options, Outcome, Start, Summary};

/// Most seeds of a cell.
const MOST_SEEDS: u64 = 1000;

/// What is to be run, and who watches it.
pub struct Request<'a> {
    /// The experiment's name.
    pub name: &'a str,
    /// Which size of it.
    pub size: Size,
    /// Its grid.
    pub grid: Grid,
    /// Seeds of each cell, from 0.
    pub seeds: u64,
    /// Output folder.
    pub out: &'a Path,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Settings on top of those of every cell.
    pub set: &'a [String],
    /// Runs cells again whose result belongs to another configuration.
    pub overwrite: bool,
    /// Set it to save the running cell and return.
    pub stop: &'a AtomicBool,
    /// Is told what happens.
    pub watch: &'a mut (dyn FnMut(Event) + Send),
}

impl<'a> Request<'a> {
    /// An experiment as it is meant, computed wherever it can be; `seeds` instead of the grid's own.
    pub fn new(
        experiment: &'a Experiment,
        size: Size,
        seeds: Option<u64>,
        out: &'a Path,
        stop: &'a AtomicBool,
        watch: &'a mut (dyn FnMut(Event) + Send),
    ) -> Self {
        let grid = (experiment.grid)(size);
        Self {
            name: experiment.name,
            size,
            seeds: seeds.unwrap_or(grid.seeds),
            grid,
            out,
            device: DeviceChoice::default(),
            set: &[],
            overwrite: false,
            stop,
            watch,
        }
    }
}

/// What an experiment tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// A cell starts.
    Cell {
        /// Which run, from 1.
        number: usize,
        /// Of how many.
        total: usize,
        /// Its cell.
        cell: &'a Cell,
        /// Its seed.
        seed: u64,
        /// Time until the last one is done, once a cell has shown how long it takes.
        left: Option<Duration>,
    },
    /// The cell's own run goes on.
    Run(runs::Event<'a>),
}

/// How an experiment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Every cell has its result.
    Finished,
    /// It was stopped.
    Stopped {
        /// Runs that are done.
        done: usize,
        /// Of how many.
        total: usize,
    },
}

/// `result.json` of a cell and a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellResult {
    /// All settings.
    pub configuration: Value,
    /// About the success rate of a policy that remembers nothing, if that is known.
    pub without_memory: Option<f64>,
    /// What it came to, by the names of the grid's measures.
    pub values: BTreeMap<String, f64>,
    /// Why there are no values: the loss was not finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Seconds that it took.
    pub seconds: f64,
}

/// The results so far, in the order of the cells and then of the seeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Results {
    /// Seeds of each cell.
    pub seeds: u64,
    results: Vec<Option<CellResult>>,
}

impl Results {
    fn new(cells: usize, seeds: u64) -> Self {
        Self {
            seeds,
            results: vec![None; cells * seeds as usize],
        }
    }

    /// The result of a cell, by its number, and a seed.
    pub fn get(&self, cell: usize, seed: u64) -> Option<&CellResult> {
        self.results.get(self.index(cell, seed))?.as_ref()
    }

    fn set(&mut self, cell: usize, seed: u64, result: CellResult) {
        let index = self.index(cell, seed);
        self.results[index] = Some(result);
    }

    fn index(&self, cell: usize, seed: u64) -> usize {
        cell * self.seeds as usize + seed as usize
    }

    fn done(&self) -> usize {
        self.results.iter().flatten().count()
    }

    /// Time for what is not done, from what is: another seed of the same cell, or else the mean.
    fn left(&self) -> Option<Duration> {
        let mean = |results: &mut dyn Iterator<Item = &CellResult>| {
            let (count, sum) = results.fold((0.0, 0.0), |(count, sum), result| {
                (count + 1.0, sum + result.seconds)
            });
            (count > 0.0).then_some(sum / count)
        };
        let of_all = mean(&mut self.results.iter().flatten())?;
        let of_cell = |cell: &[Option<CellResult>]| {
            let missing = cell.iter().filter(|result| result.is_none()).count();
            missing as f64 * mean(&mut cell.iter().flatten()).unwrap_or(of_all)
        };
        let seconds = self.results.chunks(self.seeds as usize).map(of_cell).sum();
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// Runs what is missing of a grid, seed after seed, and keeps table and picture up to date.
///
/// # Errors
/// A configuration that cannot be used, a result of another one, whatever stops a run.
pub fn run(request: Request) -> Result<End, Error> {
    let Request {
        name,
        size,
        grid,
        seeds,
        out,
        device,
        set,
        overwrite,
        stop,
        watch,
    } = request;
    if !(1..=MOST_SEEDS).contains(&seeds) {
        return Err(Error::Argument {
            argument: "--seeds",
            found: seeds.to_string(),
            expected: format!("1 to {MOST_SEEDS}"),
        });
    }
    let place = |cell: &Cell, seed: u64| {
        let seed = format!("seed-{seed}");
        CellFolder(out.join("cells").join(cell.folder()).join(seed))
    };
    let plan = |cell: &Cell, seed: u64| {
        let base = grid
            .adapted_by(cell)
            .map(|base| place(&grid.cells[base], seed).0);
        Plan::of(cell, base.as_deref(), set, seed).map_err(Error::of_config(&cell.name, seed))
    };
    let mut results = Results::new(grid.cells.len(), seeds);
    let all = || (0..seeds).flat_map(|seed| grid.cells.iter().enumerate().map(move |c| (seed, c)));
    // All of it is looked at before hours are spent on a part.
    for (seed, (index, cell)) in all() {
        let base = grid.adapted_by(cell);
        if base.is_some_and(|base| results.get(base, seed).is_none()) {
            // It is run again, and what adapts it as well.
            continue;
        }
        let plan = plan(cell, seed)?;
        let folder = place(cell, seed);
        if let Some(result) = folder.load(&plan.configuration()?, overwrite)? {
            results.set(index, seed, result);
        }
    }
    let report = |results: &Results| report::write(out, name, size, set, &grid, results);
    let total = results.results.len();
    for (seed, (index, cell)) in all() {
        if results.get(index, seed).is_some() {
            continue;
        }
        watch(Event::Cell {
            number: results.done() + 1,
            total,
            cell,
            seed,
            left: results.left(),
        });
        let plan = plan(cell, seed)?;
        let folder = place(cell, seed);
        let work = Work {
            folder: &folder,
            device,
            overwrite,
            stop,
        };
        let found = work.carry_out(&plan, &mut |event| watch(Event::Run(event)));
        let Some(result) = found.map_err(Error::of_cell(&cell.name, seed))? else {
            report(&results)?;
            let done = results.done();
            return Ok(End::Stopped { done, total });
        };
        folder.save(&result)?;
        info!(
            "{}, seed {seed}: {}",
            cell.name,
            report::line(&grid, &result)
        );
        results.set(index, seed, result);
        report(&results)?;
    }
    report(&results)?;
    Ok(End::Finished)
}

/// What a cell and a seed come to in detail.
enum Plan {
    Train(Box<Config>),
    Memory(MemoryTest),
}

impl Plan {
    /// `adapted` is the run that the cell adapts.
    fn of(
        cell: &Cell,
        adapted: Option<&Path>,
        set: &[String],
        seed: u64,
    ) -> Result<Self, ConfigError> {
        let own = adapted.map(|base| format!("finetune.base=\"{}\"", base.display()));
        let own: Vec<String> = own.into_iter().chain([format!("seed={seed}")]).collect();
        let set = [&cell.set, set, &own].concat();
        match cell.base {
            Base::Train { name, text } => {
                let config = Config::parse_on_base(name, text, &set)?;
                Ok(Self::Train(Box::new(config)))
            }
            Base::Memory => MemoryTest::parse(&set).map(Self::Memory),
        }
    }

    fn configuration(&self) -> Result<Value, train::Error> {
        let value = match self {
            Self::Train(config) => serde_json::to_value(config),
            Self::Memory(test) => serde_json::to_value(test),
        };
        value.map_err(|error| unfit(Path::new("the configuration"), &error))
    }
}

/// The circumstances of a run.
struct Work<'a> {
    folder: &'a CellFolder,
    device: DeviceChoice,
    overwrite: bool,
    stop: &'a AtomicBool,
}

impl Work<'_> {
    /// None if it was stopped.
    fn carry_out(
        &self,
        plan: &Plan,
        watch: &mut (dyn FnMut(runs::Event) + Send),
    ) -> Result<Option<CellResult>, train::Error> {
        let start = Instant::now();
        let (without_memory, found) = match plan {
            Plan::Train(config) => {
                let chance = config.task.as_ref().map(Task::chance);
                (chance, self.train(config, watch))
            }
            Plan::Memory(test) => (Some(test.chance()), test.run(self.stop, watch)),
        };
        let (values, failure) = match found {
            Ok(Some(values)) => (values, None),
            Ok(None) => return Ok(None),
            // A form that blows up is a result, too.
            Err(train::Error::NotFinite {
                step, what, value, ..
            }) => (
                BTreeMap::new(),
                Some(format!("step {step}: {what} is {value}")),
            ),
            Err(error) => return Err(error),
        };
        Ok(Some(CellResult {
            configuration: plan.configuration()?,
            without_memory,
            values,
            failure,
            seconds: start.elapsed().as_secs_f64(),
        }))
    }

    fn train(
        &self,
        config: &Config,
        watch: &mut (dyn FnMut(runs::Event) + Send),
    ) -> Result<Option<BTreeMap<String, f64>>, train::Error> {
        let folder = Folder::new(&self.folder.0);
        let mut once = |start| {
            let options = Options {
                folder: &folder,
                start,
                stop: self.stop,
                watch,
            };
            let place = Place {
                device: self.device,
                precision: config.train.precision,
                ranks: None,
            };
            run_on(place, Training { config, options })
        };
        let outcome = if folder.config().exists() {
            match once(Start::Resume) {
                Err(train::Error::Changed { .. }) if self.overwrite => once(Start::Overwrite),
                outcome => outcome,
            }
        } else {
            once(Start::Overwrite)
        };
        Ok(match outcome? {
            Outcome::Finished(summary) => Some(values(&summary)),
            // There is one rank only.
            Outcome::Stopped { .. } | Outcome::Helped => None,
        })
    }
}

struct Training<'a> {
    config: &'a Config,
    options: Options<'a>,
}

impl Job for Training<'_> {
    type Output = Outcome;

    fn run<B: Backend<Element = f32>>(self, backend: B) -> Result<Outcome, train::Error> {
        // The log of a single run, many times over, would hide which cell it is.
        tracing::subscriber::with_default(NoSubscriber::new(), || {
            runs::train(backend, self.config, self.options)
        })
    }
}

/// What the trainer's summary says, by the names of measures.
fn values(summary: &Summary) -> BTreeMap<String, f64> {
    let values = [
        ("success_rate", summary.success_rate),
        ("parameters", Some(summary.parameters as f64)),
        (
            "trained_parameters",
            Some(summary.trained_parameters as f64),
        ),
    ];
    // Of several tasks of the base, the mean.
    let forgetting = summary.adaptation.iter().flat_map(|adaptation| {
        let tasks = &adaptation.base_tasks;
        let mean = |rate: fn(&Forgetting) -> f64| {
            (!tasks.is_empty()).then(|| tasks.iter().map(rate).sum::<f64>() / tasks.len() as f64)
        };
        [
            ("base_before", mean(|task| task.before.success_rate)),
            ("base_after", mean(|task| task.after.success_rate)),
        ]
    });
    let known = values.into_iter().chain(forgetting);
    known
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect()
}

/// The folder of a cell and a seed: that of a run, and its result.
struct CellFolder(PathBuf);

impl CellFolder {
    fn result(&self) -> PathBuf {
        self.0.join("result.json")
    }

    /// The result, if there is one and it is not to be replaced.
    fn load(&self, configuration: &Value, overwrite: bool) -> Result<Option<CellResult>, Error> {
        let path = self.result();
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(io("read it", &path))?;
        let found: Result<CellResult, _> = serde_json::from_str(&text);
        let difference = match &found {
            Ok(found) => difference("", &found.configuration, configuration),
            Err(_) if overwrite => return Ok(None),
            Err(error) => return Err(unfit(&path, error).into()),
        };
        match difference {
            None => Ok(found.ok()),
            Some(_) if overwrite => Ok(None),
            Some([key, saved, found]) => Err(Error::Changed {
                path,
                key,
                saved,
                found,
            }),
        }
    }

    /// Writes the result; what only an unfinished run needs is removed.
    fn save(&self, result: &CellResult) -> Result<(), train::Error> {
        let path = self.result();
        let text = serde_json::to_string(result).map_err(|error| unfit(&path, &error))? + "\n";
        std::fs::create_dir_all(&self.0).map_err(io("create this folder", &self.0))?;
        write_beside(&path, text.as_bytes()).map_err(io("write it", &path))?;
        let state = Folder::new(&self.0).state();
        if state.exists() {
            std::fs::remove_file(&state).map_err(io("remove it", &state))?;
        }
        Ok(())
    }
}

/// The first setting in which two configurations differ, with its values.
fn difference(path: &str, a: &Value, b: &Value) -> Option<[String; 3]> {
    let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
    match (a, b) {
        (Value::Object(one), Value::Object(other)) => {
            let new = other.keys().filter(|key| !one.contains_key(*key));
            one.keys().chain(new).find_map(|key| {
                let path = match path {
                    "" => key.clone(),
                    _ => format!("{path}.{key}"),
                };
                match (one.get(key), other.get(key)) {
                    (Some(a), Some(b)) => difference(&path, a, b),
                    (a, b) => Some([path, show(a), show(b)]),
                }
            })
        }
        _ if a == b => None,
        _ => Some([path.to_owned(), a.to_string(), b.to_string()]),
    }
}

pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> train::Error {
    move |source| train::Error::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

fn unfit(path: &Path, error: &serde_json::Error) -> train::Error {
    train::Error::File {
        path: path.to_owned(),
        what: "contents".to_owned(),
        found: error.to_string(),
        expected: "a result as `dtmem experiment` writes it".to_owned(),
    }
}
