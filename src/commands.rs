//! One function per command. Results go to stdout, everything else to stderr.

use std::error::Error;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dtmem::backend::Backend;
use dtmem::experiment::Size;
use dtmem::experiment::run::{self as experiments, End};
use dtmem::inspect::{self, Inspection, Request};
use dtmem::model::Model;
use dtmem::tasks::{Demonstrations, Task};
use dtmem::train::adapters::{apply_adapter, merge_adapter};
use dtmem::train::checkpoint::{self, ModelHeader};
use dtmem::train::config::{Config, TaskConfig};
use dtmem::train::device::{DeviceChoice, Job, Place, run_on};
use dtmem::train::evaluate::{self, Episodes, TaskResult};
use dtmem::train::finetune::Adaptation;
use dtmem::train::ranks::Ranks;
use dtmem::train::run::{self, Event, Folder, Options, Outcome, Start, Summary};
use serde_json::{Map, Value};
use tracing::info;

use crate::progress::Progress;
use crate::{Bench, Demos, Eval, Experiment, Finetune, Inspect, Merge, Run, Verify};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;
type Fallible<T> = std::result::Result<T, dtmem::train::Error>;

/// As if ended by Ctrl-C.
const INTERRUPTED: u8 = 130;

/// Runs a command on a pool of `threads` threads.
pub fn in_pool<T: Send>(
    threads: Option<usize>,
    command: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    const MOST: usize = 1024;
    if let Some(threads) = threads.filter(|threads| !(1..=MOST).contains(threads)) {
        return Err(format!("--threads: found {threads}, expected 1 to {MOST}").into());
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0))
        .build()
        .map_err(|error| format!("--threads: {error}"))?
        .install(command)
}

struct Training<'a> {
    config: &'a Config,
    options: Options<'a>,
}

impl Job for Training<'_> {
    type Output = Outcome;

    fn run<B: Backend<Element = f32>>(self, backend: B) -> Fallible<Outcome> {
        run::train(backend, self.config, self.options)
    }
}

/// `dtmem train`.
pub fn train(arguments: &Run) -> Result<ExitCode> {
    let config = Config::load(&arguments.config, &arguments.overrides)?;
    let folder = Path::new("runs").join(name_of(&arguments.config));
    let again = format!("dtmem train {}", arguments.config.display());
    start(&config, arguments, folder, again)
}

/// `dtmem finetune`: a run whose configuration has a table `[finetune]`, which may come from here.
pub fn finetune(arguments: &Finetune) -> Result<ExitCode> {
    let Finetune {
        run,
        base,
        method,
        share,
    } = arguments;
    let base = base.as_ref().map(|base| base.display().to_string());
    let method = method.map(|method| method.to_string());
    let given = [
        ("base", base.map(toml::Value::from)),
        ("method", method.map(toml::Value::from)),
        ("share", share.map(toml::Value::from)),
    ];
    let mut table = toml::Table::new();
    let mut again = format!("dtmem finetune {}", run.config.display());
    for (key, value) in given {
        if let Some(value) = value {
            write!(again, " --{key} {}", value.to_string().replace('"', "'"))?;
            table.insert(key.to_owned(), value);
        }
    }
    let config = Config::load_finetune(&run.config, &run.overrides, table)?;
    let Some(adaptation) = &config.finetune else {
        return Err("finetune: expected --base DIR, the output folder of a run".into());
    };
    let folder = format!("{}-{}", name_of(&run.config), adaptation.method);
    start(&config, run, Path::new("runs").join(folder), again)
}

/// The file's name, less `.toml`.
fn name_of(config: &Path) -> String {
    let name = config.file_stem().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Runs; `again` is the command line without what `arguments` add to it.
fn start(config: &Config, arguments: &Run, folder: PathBuf, mut again: String) -> Result<ExitCode> {
    let folder = Folder::new(arguments.out.clone().unwrap_or(folder));
    let mut progress = Progress::new();
    let stop = stop_on_interrupt()?;
    let job = Training {
        config,
        options: Options {
            folder: &folder,
            start: match (arguments.resume, arguments.overwrite) {
                (true, _) => Start::Resume,
                (_, true) => Start::Overwrite,
                _ => Start::Fresh,
            },
            stop: &stop,
            watch: &mut |event| progress.show(event),
        },
    };
    let ranks = Ranks::from_environment(|name| std::env::var(name).ok())?;
    let place = Place {
        device: arguments.device,
        precision: config.train.precision,
        ranks: ranks.as_ref(),
    };
    match run_on(place, job)? {
        Outcome::Finished(summary) => {
            print_json(&summary)?;
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Helped => Ok(ExitCode::SUCCESS),
        Outcome::Stopped { step } => {
            for argument in &arguments.overrides {
                write!(again, " --set '{argument}'")?;
            }
            if arguments.device != DeviceChoice::default() {
                write!(again, " --device {}", arguments.device)?;
            }
            write!(again, " --out {} --resume", folder.path().display())?;
            info!("stopped after step {step}, saved; continue with: {again}");
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

struct Evaluating<'a> {
    arguments: &'a Eval,
    file: &'a Path,
    bytes: &'a [u8],
    stop: &'a AtomicBool,
    progress: Progress,
}

impl Job for Evaluating<'_> {
    /// None if it was stopped.
    type Output = Option<Summary>;

    fn run<B: Backend<Element = f32>>(mut self, backend: B) -> Fallible<Option<Summary>> {
        let (mut model, base) = checkpoint::model_from_bytes(self.file, self.bytes, backend)?;
        let Some(folder) = &self.arguments.adapter else {
            let (config, step) = (&base.config, base.step);
            return self.summary(&model, config, &base.target_returns, step);
        };
        let (adapter, header) = apply_adapter(&Folder::new(folder), &mut model)?;
        let config = &header.config;
        let summary = self.summary(&model, config, &header.target_returns, header.step)?;
        let Some(mut summary) = summary else {
            return Ok(None);
        };
        let tensors = adapter.tensors.iter();
        summary.trained_parameters = tensors.map(|tensor| tensor.values.len()).sum();
        let (tasks, targets) = base.trained_tasks();
        let after = self.play(&model, config, &tasks, &targets)?;
        model.use_adapter(None)?;
        let before = self.play(&model, config, &tasks, &targets)?;
        Ok(before.zip(after).map(|(before, after)| {
            let finetune = config.finetune.as_ref();
            summary.adaptation = finetune.map(|from| Adaptation::new(from, &before, &after));
            summary
        }))
    }
}

impl Evaluating<'_> {
    /// Plays tasks, as many episodes as were asked for or as a run's configuration says.
    fn play<B: Backend<Element = f32>>(
        &mut self,
        model: &Model<B>,
        config: &Config,
        tasks: &[TaskConfig],
        targets: &[f64],
    ) -> Fallible<Option<Vec<TaskResult>>> {
        let Eval { episodes, seed, .. } = self.arguments;
        let episodes = Episodes {
            each: episodes.unwrap_or(config.evaluation.episodes),
            seed: seed.unwrap_or(config.evaluation.seed),
        };
        let watch = |done, total| self.progress.show(Event::Evaluation { done, total });
        evaluate::evaluate_all(model, tasks, targets, episodes, self.stop, watch)
    }

    /// Plays the tasks of a run and sums up.
    fn summary<B: Backend<Element = f32>>(
        &mut self,
        model: &Model<B>,
        config: &Config,
        targets: &[f64],
        step: u64,
    ) -> Fallible<Option<Summary>> {
        let tasks = config.task_list();
        if tasks
            .iter()
            .all(|task| task.task.is_none() && !task.has_validation())
        {
            return Err(dtmem::train::Error::NoTask(self.file.to_owned()));
        }
        let asked = self.arguments.target_return;
        let targets: Vec<f64> = targets.iter().map(|own| asked.unwrap_or(*own)).collect();
        let results = self.play(model, config, &tasks, &targets)?;
        let kept = evaluate::validation_data(config)?;
        let kept = kept.iter().map(|(label, data)| (label.as_str(), data));
        let validation = evaluate::validate_all(model, kept, self.stop)?;
        Ok(results.zip(validation).map(|(results, validation)| {
            let lines = run::result_lines(&results).into_iter();
            for line in lines.chain(validation.iter().map(run::validation_line)) {
                info!("{line}");
            }
            let played = results.iter().map(|result| {
                let evaluation = &result.evaluation;
                (evaluation.tokens, evaluation.seconds)
            });
            let validated = validation.iter().map(|one| (one.tokens, one.seconds));
            let (tokens, seconds) = played
                .chain(validated)
                .fold((0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
            Summary {
                validation,
                ..Summary::new(&results, model, step, tokens, seconds)
            }
        }))
    }
}

/// `dtmem eval`.
pub fn eval(arguments: &Eval) -> Result<ExitCode> {
    let folder = Folder::new(&arguments.folder);
    let file = folder.model();
    if !file.exists() && folder.adapter().exists() {
        let folder = folder.path().display();
        return Err(format!(
            "{folder}: an adapter, which is evaluated on its base: dtmem eval BASE --adapter {folder}"
        )
        .into());
    }
    let bytes = checkpoint::read(&file)?;
    let header = checkpoint::model_header(&file, &bytes)?;
    if arguments
        .target_return
        .is_some_and(|value| !value.is_finite())
    {
        return Err("--target-return: expected a finite number".into());
    }
    let stop = stop_on_interrupt()?;
    let job = Evaluating {
        arguments,
        file: &file,
        bytes: &bytes,
        stop: &stop,
        progress: Progress::new(),
    };
    let place = Place {
        device: arguments.device,
        precision: header.config.train.precision,
        ranks: None,
    };
    match run_on(place, job)? {
        Some(summary) => {
            print_json(&summary)?;
            Ok(ExitCode::SUCCESS)
        }
        None => Ok(ExitCode::from(INTERRUPTED)),
    }
}

struct Inspecting<'a> {
    arguments: &'a Inspect,
    file: &'a Path,
    bytes: &'a [u8],
    progress: Progress,
}

impl Job for Inspecting<'_> {
    type Output = std::result::Result<Inspection, inspect::Error>;

    fn run<B: Backend<Element = f32>>(mut self, backend: B) -> Fallible<Self::Output> {
        let (mut model, mut header) = checkpoint::model_from_bytes(self.file, self.bytes, backend)?;
        if let Some(folder) = &self.arguments.adapter {
            let (_, adapter) = apply_adapter(&Folder::new(folder), &mut model)?;
            header = adapter.on(&header, model.spaces());
        }
        Ok(self.show(&model, &header))
    }
}

impl Inspecting<'_> {
    fn show<B: Backend<Element = f32>>(
        &mut self,
        model: &Model<B>,
        header: &ModelHeader,
    ) -> std::result::Result<Inspection, inspect::Error> {
        let Inspect {
            folder,
            adapter,
            task,
            ..
        } = self.arguments;
        let mut name = folder.display().to_string();
        if let Some(adapter) = adapter {
            name += &format!(" with {}", adapter.display());
        }
        let request = Request {
            name: &name,
            task: &inspect::task(header, task.as_deref())?,
            episode: self.arguments.seed,
            failed: (self.arguments.failed).then_some(header.config.evaluation.episodes),
        };
        let total = request.failed.unwrap_or(0);
        let watch = |done| self.progress.show(Event::Evaluation { done, total });
        let shown = inspect::inspect(model, header, &request, watch);
        if total > 0 {
            self.progress.show(Event::Evaluation { done: total, total });
        }
        shown
    }
}

/// `dtmem inspect`: the page, and what it says first.
pub fn inspect(arguments: &Inspect) -> Result<ExitCode> {
    let folder = &arguments.folder;
    let file = Folder::new(folder).model();
    let bytes = std::fs::read(&file).map_err(|source| inspect::Error::NoModel {
        folder: folder.clone(),
        source,
    })?;
    let header = checkpoint::model_header(&file, &bytes)?;
    let job = Inspecting {
        arguments,
        file: &file,
        bytes: &bytes,
        progress: Progress::new(),
    };
    let place = Place {
        device: arguments.device,
        precision: header.config.train.precision,
        ranks: None,
    };
    let shown = run_on(place, job)??;
    let page = match &arguments.out {
        Some(page) => page.clone(),
        None => {
            let folder = arguments.adapter.as_ref().unwrap_or(folder);
            folder.join(format!("episode-{}.html", shown.number))
        }
    };
    shown.write(&page)?;
    let mut text = format!("{}\n", shown.diagnosis.verdict);
    for reason in &shown.diagnosis.reasons {
        writeln!(text, "{reason}")?;
    }
    print(&text)?;
    info!("episode {} is shown in {}", shown.number, page.display());
    Ok(ExitCode::SUCCESS)
}

/// `dtmem merge`.
pub fn merge(arguments: &Merge) -> Result<ExitCode> {
    let Merge {
        base,
        adapter,
        out,
        overwrite,
    } = arguments;
    let _log = Progress::new();
    merge_adapter(
        &Folder::new(base),
        &Folder::new(adapter),
        &Folder::new(out),
        *overwrite,
    )?;
    info!(
        "{} with {} folded in is in {}",
        base.display(),
        adapter.display(),
        out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// `dtmem demos`.
pub fn demos(arguments: &Demos) -> Result<ExitCode> {
    match (&arguments.inspect, &arguments.task, &arguments.out) {
        (Some(file), _, _) => print(&describe(&Demonstrations::load(file)?)?)?,
        (None, Some(name), Some(out)) => {
            let task = task(name, arguments)?;
            let mut progress = Progress::new();
            let total = arguments.episodes as u64;
            let set = Demonstrations::generate(
                &task,
                arguments.episodes,
                arguments.seed,
                arguments.annotated,
                |done| {
                    progress.show(Event::Demonstrations {
                        done: done as u64,
                        total,
                    });
                },
            )?;
            set.save(out)?;
            info!(
                "{} episodes of {}, {} steps, in {}",
                set.len(),
                task.name(),
                set.steps(),
                out.display()
            );
        }
        _ => return Err("demos: expected TASK and --out FILE, or --inspect FILE".into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// The task of a command line: the same keys as in a configuration.
fn task(name: &str, arguments: &Demos) -> Result<Task> {
    let given = [
        ("name", Some(Value::from(name))),
        ("length", arguments.length.map(Value::from)),
        ("test_frequency", arguments.test_frequency.map(Value::from)),
        (
            "empty_frequency",
            arguments.empty_frequency.map(Value::from),
        ),
        ("kind", arguments.kind.clone().map(Value::from)),
        ("pairs", arguments.pairs.map(Value::from)),
        ("steps", arguments.steps.map(Value::from)),
    ];
    let table: Map<String, Value> = given
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect();
    let task: Task =
        serde_json::from_value(table.into()).map_err(|error| format!("task `{name}`: {error}"))?;
    task.validate()?;
    Ok(task)
}

/// What `--inspect` shows.
fn describe(set: &Demonstrations) -> Result<String> {
    let mut text = String::new();
    if let Some(task) = &set.task {
        writeln!(text, "task           {}", serde_json::to_string(task)?)?;
    }
    if let Some(seed) = set.seed {
        writeln!(text, "seed           {seed}")?;
    }
    let steps: Vec<usize> = set.episodes().map(|episode| episode.steps()).collect();
    let annotated = set.episodes().filter(|episode| episode.annotated).count();
    let pairs: usize = set.episodes().map(|episode| episode.pairs.len()).sum();
    let earlier = set
        .episodes()
        .flat_map(|episode| episode.pairs)
        .filter(|(recalling, recalled)| recalled < recalling)
        .count();
    let returns: Vec<f64> = set
        .episodes()
        .map(|episode| episode.rewards.iter().copied().map(f64::from).sum())
        .collect();
    let count = steps.len().max(1) as f64;
    let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = |values: &[f64]| values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    writeln!(text, "episodes       {}", set.len())?;
    writeln!(
        text,
        "steps          {} ({} to {} an episode, {:.1} on average)",
        set.steps(),
        steps.iter().min().unwrap_or(&0),
        set.longest(),
        set.steps() as f64 / count
    )?;
    writeln!(text, "observations   {}", set.space())?;
    match set.taken() {
        Some(taken) => writeln!(text, "actions        {}, taken {taken:?}", taken.len())?,
        None => {
            writeln!(text, "actions        {}", set.family().action)?;
            let width = set.family().action.fields();
            for number in 0..width {
                let values = set.episodes().flat_map(|episode| {
                    let values = episode.actions.reals();
                    let values = values.iter().skip(number).step_by(width);
                    values.copied().map(f64::from)
                });
                let values: Vec<f64> = values.collect();
                writeln!(
                    text,
                    "action [{number}]     {:.4} to {:.4}, {:.4} on average",
                    least(&values),
                    most(&values),
                    values.iter().sum::<f64>() / values.len().max(1) as f64
                )?;
            }
        }
    }
    if !returns.is_empty() {
        writeln!(
            text,
            "returns        {:.3} to {:.3}, {:.3} on average",
            least(&returns),
            most(&returns),
            returns.iter().sum::<f64>() / count
        )?;
    }
    writeln!(
        text,
        "annotated      {annotated} episodes, {pairs} pairs, {earlier} of them to an earlier step"
    )?;
    Ok(text)
}

/// `dtmem experiment`: the table goes to stdout.
pub fn experiment(arguments: &Experiment) -> Result<ExitCode> {
    let size = if arguments.full {
        Size::Full
    } else {
        Size::Quick
    };
    let mut progress = Progress::new();
    let stop = stop_on_interrupt()?;
    let several = arguments.name.0.len() > 1;
    for experiment in arguments.name.0 {
        let name = experiment.name;
        // Each of several experiments has a folder of its own.
        let out = match &arguments.out {
            Some(out) if several => out.join(name),
            Some(out) => out.clone(),
            None => Path::new("runs").join(format!("{name}-{}", size.name())),
        };
        let mut watch = |event: experiments::Event| progress.show_experiment(event);
        let request = experiments::Request {
            device: arguments.device,
            set: &arguments.overrides,
            overwrite: arguments.overwrite,
            ..experiments::Request::new(experiment, size, arguments.seeds, &out, &stop, &mut watch)
        };
        if let End::Stopped { done, total } = experiments::run(request)? {
            let command = continuation(arguments, size)?;
            info!("stopped after {done} of {total} runs, saved; continue with: {command}");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        let table = out.join("results.md");
        let text = std::fs::read_to_string(&table)
            .map_err(|error| format!("{}: cannot read it: {error}", table.display()))?;
        print(&text)?;
        info!("table, CSV file and picture are in {}", out.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The command that goes on with an experiment.
fn continuation(arguments: &Experiment, size: Size) -> Result<String> {
    let name = match arguments.name.0 {
        [only] => only.name,
        _ => "all",
    };
    let mut command = format!("dtmem experiment {name} --{}", size.name());
    if let Some(seeds) = arguments.seeds {
        write!(command, " --seeds {seeds}")?;
    }
    for argument in &arguments.overrides {
        write!(command, " --set '{argument}'")?;
    }
    if let Some(out) = &arguments.out {
        write!(command, " --out {}", out.display())?;
    }
    if arguments.device != DeviceChoice::default() {
        write!(command, " --device {}", arguments.device)?;
    }
    Ok(command)
}

/// `dtmem verify`: exit code 1 if any number is off.
pub fn verify(arguments: &Verify) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let Verify {
        files,
        backend,
        dtype,
    } = arguments;
    let passed = dtmem::verify::run(files, *backend, *dtype, &mut out)?;
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// `dtmem bench`: a line per row while it runs, and the report in a file.
pub fn bench(arguments: &Bench) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let report = dtmem::bench::run(arguments.device, &arguments.filter, &mut out)?;
    for comparison in report.comparisons() {
        writeln!(out, "both versions: {comparison}").map_err(|error| format!("stdout: {error}"))?;
    }
    if let Some(file) = &arguments.json {
        let json = serde_json::to_string(&report)? + "\n";
        dtmem::tasks::write_beside(file, json.as_bytes())
            .map_err(|error| format!("{}: cannot write it: {error}", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `dtmem info`.
pub fn info() -> Result<ExitCode> {
    print(&crate::info::describe())?;
    Ok(ExitCode::SUCCESS)
}

/// A flag that Ctrl-C sets; a second Ctrl-C ends the process at once.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
        info!("stopping after this step; once more to stop at once, without saving");
    })?;
    Ok(stop)
}

fn print_json(summary: &Summary) -> Result<()> {
    print(&(serde_json::to_string(summary)? + "\n"))
}

/// To stdout. A closed pipe is an error and not a panic.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| format!("stdout: {error}").into())
}
