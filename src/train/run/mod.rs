//! A whole run: prepare, train, save, evaluate, draw.

mod folder;
mod summary;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tracing::info;

use super::adapters::{AdapterHeader, save_adapter};
use super::checkpoint::{self, ModelHeader, State, StateHeader};
use super::config::{Config, OptimiserKind, TrainConfig, validate_spaces};
use super::data::{Batches, Chosen, Mixture, TrainingData};
use super::evaluate::{self, Episodes, TaskResult, Validation};
use super::finetune::{Adaptation, Base, Method};
use super::metrics::{Line, Records, Window};
use super::schedule::Schedule;
use super::{Error, plots};
use crate::backend::Backend;
use crate::batch::Trajectory;
use crate::model::{Model, ModelError, OptimiserStep, SupervisedPart, TrainedPart, Training};
use crate::tasks::{Demonstrations, Split, Task, write_beside};
pub use folder::Folder;
use summary::save_summary;
pub use summary::{Evaluated, Summary, TaskSummary, result_lines, validation_line};

/// What to do about a run that the output folder holds already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Refuse.
    Fresh,
    /// Continue it.
    Resume,
    /// Remove it.
    Overwrite,
}

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// Demonstrations have been generated.
    Demonstrations {
        /// How many.
        done: u64,
        /// Of how many.
        total: u64,
    },
    /// A step has been done, or handed to a backend that is still at it.
    Step {
        /// Which, from 1.
        step: u64,
        /// Of how many.
        steps: u64,
    },
    /// A line of the metrics has been written.
    Metrics(&'a Line),
    /// Episodes have been evaluated.
    Evaluation {
        /// How many.
        done: u64,
        /// Of how many.
        total: u64,
    },
}

/// Where a run goes, and who watches it.
pub struct Options<'a> {
    /// Output folder.
    pub folder: &'a Folder,
    /// What to do about a run that it holds already.
    pub start: Start,
    /// Set it to finish the current step, save and return.
    pub stop: &'a AtomicBool,
    /// Is told what happens.
    pub watch: &'a mut (dyn FnMut(Event) + Send),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It is done.
    Finished(Box<Summary>),
    /// It is done, and rank 0 sums it up.
    Helped,
    /// It was stopped; this many steps are saved.
    Stopped {
        /// Steps done.
        step: u64,
    },
}

/// Trains on a backend as the configuration says, from the start, from a base, or from where the
/// folder's run was left. Of several ranks, all of which are to be called so, the first one writes
/// and evaluates.
pub fn train<B: Backend<Element = f32>>(
    backend: B,
    config: &Config,
    options: Options,
) -> Result<Outcome, Error> {
    let Options {
        folder,
        start,
        stop,
        watch,
    } = options;
    config.validate()?;
    if let Some(finetune) = &config.finetune {
        finetune.check_apart_from(folder.path())?;
    }
    let rank = backend.rank();
    let saved = match rank.is_first() {
        true => check_folder(folder, start, config)?,
        false if start == Start::Resume => saved_state(folder, config)?,
        false => None,
    };
    let mut silent = |_: Event| {};
    let watch: &mut (dyn FnMut(Event) + Send) = match rank.is_first() {
        true => watch,
        false => &mut silent,
    };
    let mut data = prepare_data(config, watch)?;
    let base = config.finetune.as_ref().map(Base::load).transpose()?;
    if let Some(base) = &base {
        base.check_spaces(data.spaces())?;
        data.extend(&base.header().spaces);
    }
    validate_spaces(&config.model, data.spaces())?;
    let order = data.order(config)?;
    let capacity = order.capacity(&config.model, data.spaces().families.len());
    let method = base.as_ref().map(Base::method);
    let part = method.map_or(TrainedPart::All, Method::part);
    let steps = match (config.train.steps, config.train.epochs) {
        _ if part == TrainedPart::Nothing => 0,
        (Some(steps), _) => steps,
        (None, epochs) => order.steps_of(epochs.unwrap_or_default()),
    };
    let shards = backend.shards(config.train.shards);
    let mut known = data.spaces().clone();
    let new = match &base {
        Some(base) => known
            .families
            .split_off(base.header().spaces.families.len()),
        None => Vec::new(),
    };
    let supervision = config.supervision();
    let settings = config.model.clone();
    let mut model = Model::partly_trained(backend, settings, known, &new, supervision, part)?;
    let mut training = Training::new(&model, capacity, shards)?;
    info!(
        "model: {} parameters, {} of them trained; {steps} steps of at most {} tokens",
        model.parameter_count(),
        model.trained_count(),
        order.budget()
    );
    let mut batches = Batches::new(&data, order, model.packer());
    model.initialise(config.seed)?;
    match &base {
        Some(base) if base.method() != Method::Scratch => base.start(&mut model)?,
        _ => {}
    }
    let state = match saved {
        Some(bytes) => {
            let state = restore(folder, &bytes, &mut model, &mut training, &mut batches)?;
            if let Some(base) = &base {
                base.check_same(&state)?;
            }
            state
        }
        None => StateHeader::start(config, base.as_ref().map(Base::fingerprint)),
    };
    if rank.is_first() {
        claim_folder(folder, start, config)?;
    }
    let mut run = Run {
        config,
        folder,
        base,
        target_returns: data
            .parts()
            .zip(config.task_list())
            .map(|((_, data), task)| task.target_return.unwrap_or_else(|| data.best_return()))
            .collect(),
        steps,
        metrics: match rank.is_first() {
            true => Some(Records::open(&folder.metrics(), state.step)?),
            false => None,
        },
        evaluations: match rank.is_first() && config.evaluation.every > 0 {
            true => Some(Records::open(&folder.evaluations(), state.step)?),
            false => None,
        },
        saved_step: (state.step > 0).then_some(state.step),
        state: StateHeader {
            config: config.clone(),
            ..state
        },
        model,
        training,
        batches,
        data: &data,
    };
    run.learn(stop, watch)?;
    if run.state.step < steps {
        return Ok(Outcome::Stopped {
            step: run.state.step,
        });
    }
    match rank.is_first() {
        true => run.finish(stop, watch),
        false => Ok(Outcome::Helped),
    }
}

/// The state to resume from, if there is one, of a folder that can be written to.
fn check_folder(folder: &Folder, start: Start, config: &Config) -> Result<Option<Vec<u8>>, Error> {
    let path = folder.path();
    let used = folder.is_used();
    let mut saved = None;
    match start {
        Start::Fresh if used => return Err(Error::Exists(path.to_owned())),
        Start::Resume if !used => return Err(Error::NothingToResume(path.to_owned())),
        Start::Resume => {
            saved = saved_state(folder, config)?;
            if saved.is_none() {
                info!("no checkpoint yet: starting from the beginning");
            }
        }
        Start::Fresh | Start::Overwrite => {}
    }
    std::fs::create_dir_all(path).map_err(Error::io("create this folder", path))?;
    Ok(saved)
}

/// Makes the folder this run's. Only once nothing more can be wrong with the run: one that was refused leaves the
/// folder as it was.
fn claim_folder(folder: &Folder, start: Start, config: &Config) -> Result<(), Error> {
    if start == Start::Overwrite {
        folder.clear()?;
    }
    let file = folder.config();
    write_beside(&file, config.to_toml()?.as_bytes()).map_err(Error::io("write it", &file))
}

/// The state that a folder holds, of a run of this configuration.
fn saved_state(folder: &Folder, config: &Config) -> Result<Option<Vec<u8>>, Error> {
    let file = folder.state();
    if !file.exists() {
        return Ok(None);
    }
    let bytes = checkpoint::read(&file)?;
    let before = checkpoint::state_config(&file, &bytes)?;
    match before.difference(config)? {
        Some((key, saved, found)) => Err(Error::Changed {
            path: folder.path().to_owned(),
            key,
            saved,
            found,
        }),
        None => Ok(Some(bytes)),
    }
}

fn prepare_data(config: &Config, watch: &mut dyn FnMut(Event)) -> Result<Mixture, Error> {
    let tasks = config.task_list();
    let called = |label: &str| match tasks.len() {
        1 => String::new(),
        _ => format!("{label}: "),
    };
    for task in &tasks {
        let called = called(task.label.as_deref().unwrap_or_default());
        if let Some(task) = &task.task {
            info!(
                "{called}task: {}; {}",
                describe(task)?,
                without_memory(task)
            );
        }
        if task.is_held_out() {
            info!("{called}held out: evaluated, not trained on");
        }
        match &task.data.file {
            Some(file) => info!("{called}reading demonstrations from {}", file.display()),
            None => info!(
                "{called}generating {} demonstrations",
                config.shared(task.data.generated_episodes())
            ),
        }
    }
    let data = Mixture::prepare(config, |done, total| {
        watch(Event::Demonstrations { done, total });
    })?;
    for (label, data) in data.parts() {
        info!(
            "{}{} demonstrations, {} of them annotated, the longest of {} steps",
            called(label),
            data.episodes(),
            data.annotated(),
            data.longest()
        );
    }
    Ok(data)
}

/// The task with its parameters, in one line.
fn describe(task: &Task) -> Result<String, Error> {
    let parameters = toml::Table::try_from(task)
        .map_err(|error| super::config::ConfigError::value("task", error, "a task"))?;
    let parameters: Vec<String> = parameters
        .iter()
        .filter(|(key, _)| *key != "name")
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    Ok(format!("{} ({})", task.name(), parameters.join(", ")))
}

/// What is said beside every success rate.
pub fn without_memory(task: &Task) -> String {
    format!(
        "a policy without memory reaches about {:.1} %",
        100.0 * task.chance()
    )
}

/// Puts a saved state back.
fn restore<B: Backend<Element = f32>>(
    folder: &Folder,
    bytes: &[u8],
    model: &mut Model<B>,
    training: &mut Training<B>,
    batches: &mut Batches,
) -> Result<StateHeader, Error> {
    let file = folder.state();
    let trained = model.trained_len();
    let state = checkpoint::state_from_bytes(&file, bytes, trained)?;
    let mut values = model.values()?;
    values[..trained].copy_from_slice(&state.parameters);
    model.set_values(&values)?;
    training.set_moments(model, &state.first_moment, &state.second_moment)?;
    training.set_loss_scale(model, state.header.loss_scale)?;
    let position = &state.header.position;
    if !batches.seek(position) {
        return Err(Error::file(
            &file,
            "`position`",
            format!("{position:?}"),
            "one that the demonstrations have",
        ));
    }
    info!("resuming after step {}", state.header.step);
    Ok(state.header)
}

/// A run under way.
struct Run<'a, B: Backend> {
    config: &'a Config,
    folder: &'a Folder,
    base: Option<Base>,
    /// Of each task.
    target_returns: Vec<f64>,
    steps: u64,
    /// None but for the first of several ranks, which writes all files.
    metrics: Option<Records<Line>>,
    /// None also where there is only the one at the end.
    evaluations: Option<Records<Evaluated>>,
    saved_step: Option<u64>,
    state: StateHeader,
    model: Model<B>,
    training: Training<B>,
    batches: Batches<'a>,
    data: &'a Mixture,
}

impl<B: Backend<Element = f32>> Run<'_, B> {
    /// Steps until the end or until `stop`, and saves. How steps went is asked for where a line is
    /// due, or a checkpoint, so that a GPU need not wait for the host after each.
    fn learn(&mut self, stop: &AtomicBool, watch: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let train = &self.config.train;
        let schedule = Schedule::new(train, self.steps);
        // A run that was stopped meanwhile has still to do it.
        self.evaluate_on_the_way(stop, watch)?;
        let mut clock = Instant::now();
        let alone = self.model.rank().is_alone();
        let mut stopped = self.is_stopped(stop)?;
        while self.state.step < self.steps && !stopped {
            let step = self.state.step + 1;
            let optimiser = optimiser_step(train, schedule.learning_rate(step));
            let batch = self.batches.next_batch()?;
            self.state.tokens += batch.tokens() as u64;
            self.training
                .step(&mut self.model, batch, self.config.seed, step, &optimiser)
                .map_err(interrupted(self.folder, self.saved_step, step))?;
            self.state.step = step;
            self.state.position = self.batches.position();
            watch(Event::Step {
                step,
                steps: self.steps,
            });
            let logs = step.is_multiple_of(train.log_every);
            let evaluates = self.evaluates();
            let mut save = step == self.steps || step.is_multiple_of(train.checkpoint_every);
            save |= evaluates;
            // Several ranks have to stop at one step, and do not talk about it after each.
            if alone || logs || save {
                stopped = self.is_stopped(stop)?;
                save |= stopped;
            }
            if save || logs {
                let window = self.collect()?;
                let seconds = clock.elapsed().as_secs_f64();
                let tokens = self.state.tokens;
                self.state.seconds += seconds;
                if let Some(line) = window.line(seconds, step, tokens, optimiser.learning_rate)
                    && let Some(metrics) = &mut self.metrics
                {
                    metrics.append(line)?;
                    watch(Event::Metrics(&line));
                }
                if save {
                    self.save()?;
                }
                if evaluates && !stopped {
                    self.evaluate_on_the_way(stop, watch)?;
                    stopped = self.is_stopped(stop)?;
                }
                clock = Instant::now();
            }
        }
        Ok(())
    }

    /// Whether a rank was told to stop: all ask at the same step, and get the same answer.
    fn is_stopped(&mut self, stop: &AtomicBool) -> Result<bool, Error> {
        let here = stop.load(Ordering::Relaxed);
        Ok(self.training.any(&self.model, here)?)
    }

    /// Whether there is an evaluation behind the last step that is not the one at the end.
    fn evaluates(&self) -> bool {
        let step = self.state.step;
        let every = self.config.evaluation.every;
        every > 0 && step > 0 && step < self.steps && step.is_multiple_of(every)
    }

    /// The evaluation behind the last step, if one is due and not recorded yet.
    fn evaluate_on_the_way(
        &mut self,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(Event),
    ) -> Result<(), Error> {
        if self.evaluates() && self.lacks_evaluation() {
            info!("after step {}:", self.state.step);
            self.evaluate(stop, watch)?;
        }
        Ok(())
    }

    /// Whether evaluations are recorded here, and that of the last step is not.
    fn lacks_evaluation(&self) -> bool {
        let lines = self.evaluations.as_ref().map(Records::lines);
        let recorded = |line: &Evaluated| line.step == self.state.step;
        lines.is_some_and(|lines| !lines.last().is_some_and(recorded))
    }

    /// Plays all tasks, measures the loss on what was kept from learning, and says and records what
    /// came out. None if `stop` was set meanwhile.
    fn evaluate(
        &mut self,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(Event),
    ) -> Result<Option<Results>, Error> {
        let (tasks, episodes) = (self.config.task_list(), self.episodes());
        let progress = |done, total| watch(Event::Evaluation { done, total });
        let (model, targets) = (&self.model, &self.target_returns);
        let played = evaluate::evaluate_all(model, &tasks, targets, episodes, stop, progress)?;
        let validation = evaluate::validate_all(model, self.data.parts(), stop)?;
        let Some((played, validation)) = played.zip(validation) else {
            return Ok(None);
        };
        let lines = result_lines(&played).into_iter();
        for line in lines.chain(validation.iter().map(validation_line)) {
            info!("{line}");
        }
        let lacks = self.lacks_evaluation();
        if let Some(evaluations) = self.evaluations.as_mut().filter(|_| lacks) {
            evaluations.append(Evaluated {
                step: self.state.step,
                tokens: self.state.tokens,
                tasks: played.iter().map(TaskSummary::from).collect(),
                validation: validation.clone(),
            })?;
        }
        Ok(Some(Results { played, validation }))
    }

    fn episodes(&self) -> Episodes {
        Episodes {
            each: self.config.evaluation.episodes,
            seed: self.config.evaluation.seed,
        }
    }

    /// The steps since the last time. Errors: one of them was not finite.
    fn collect(&mut self) -> Result<Window, Error> {
        let all = self.training.collect(&self.model).map_err(interrupted(
            self.folder,
            self.saved_step,
            self.state.step,
        ))?;
        let before = self.state.step - all.len() as u64;
        let mut window = Window::default();
        for (metrics, step) in all.iter().zip(before + 1..) {
            for (what, value) in [
                ("the loss", metrics.loss),
                ("the norm of the gradient", metrics.gradient_norm),
            ] {
                if !value.is_finite() && !metrics.is_skipped() {
                    return Err(self.not_finite(step, what, value));
                }
            }
            window.add(metrics);
        }
        Ok(window)
    }

    fn not_finite(&self, step: u64, what: &'static str, value: f64) -> Error {
        Error::NotFinite {
            step,
            what,
            value,
            kept: kept(self.folder, self.saved_step),
        }
    }

    /// Writes the state, and then the model for everyone else. A kill between the two leaves a
    /// state and an older model; both load, and resuming writes the model again.
    fn save(&mut self) -> Result<(), Error> {
        if self.metrics.is_none() {
            return Ok(());
        }
        let step = self.state.step;
        let [first_moment, second_moment] = self.training.moments(&self.model)?;
        self.state.loss_scale = self.training.loss_scale(&self.model)?;
        let mut parameters = self.model.values()?;
        parameters.truncate(self.model.trained_len());
        let state = State {
            header: self.state.clone(),
            parameters,
            first_moment,
            second_moment,
        };
        let all = [&state.parameters, &state.first_moment, &state.second_moment];
        if let Some(value) = all.into_iter().flatten().find(|value| !value.is_finite()) {
            return Err(self.not_finite(step, "a parameter or moment", f64::from(*value)));
        }
        checkpoint::save_state(&self.folder.state(), &state)?;
        self.save_model()?;
        self.saved_step = Some(step);
        Ok(())
    }

    /// What the run is for: the model, or the adapter of a base, or nothing if nothing is trained.
    fn save_model(&self) -> Result<(), Error> {
        let (targets, step) = (&self.target_returns, self.state.step);
        match &self.base {
            Some(base) if base.method() == Method::None => return Ok(()),
            Some(base) if base.method() == Method::Lora => {
                let (known, base) = (self.model.own_families(), base.fingerprint());
                let new = &self.model.spaces().families[known..];
                let header = AdapterHeader::new(self.config, base, new, targets, step);
                return save_adapter(self.folder, &self.model, &header);
            }
            _ => {}
        }
        let header = ModelHeader::new(self.config, self.model.spaces(), targets, step);
        checkpoint::save_model(&self.folder.model(), &self.model, &header)
    }

    /// Evaluates, draws and sums up.
    fn finish(mut self, stop: &AtomicBool, watch: &mut dyn FnMut(Event)) -> Result<Outcome, Error> {
        let (config, folder) = (self.config, self.folder);
        // A resumed run may have been killed before this.
        self.save_model()?;
        let Some(Results { played, validation }) = self.evaluate(stop, watch)? else {
            return Ok(Outcome::Stopped {
                step: self.state.step,
            });
        };
        let title = format!(
            "{}, {} parameters, {} steps",
            title_of(config),
            self.model.parameter_count(),
            self.steps
        );
        if self.steps > 0 {
            let lines = self.metrics.as_ref().map_or(&[][..], Records::lines);
            let evaluated = self.evaluations.as_ref().map_or(&[][..], Records::lines);
            plots::curves(&folder.curves(), &title, lines, evaluated, &played)?;
        }
        draw_map(config, &self.model, self.data, folder)?;
        let mut summary = Summary::new(
            &played,
            &self.model,
            self.state.step,
            self.state.tokens,
            self.state.seconds,
        );
        summary.validation = validation;
        if let Some(base) = self.base.take() {
            let Some(adaptation) = self.forgetting(&base, stop, watch)? else {
                return Ok(Outcome::Stopped {
                    step: self.state.step,
                });
            };
            summary.adaptation = Some(adaptation);
        }
        save_summary(&folder.summary(), &summary)?;
        info!("the run is in {}", folder.path().display());
        Ok(Outcome::Finished(Box::new(summary)))
    }

    /// Success on the base's own tasks, with the model as it is and with that of the base, which
    /// takes its place. None if it was stopped.
    fn forgetting(
        &mut self,
        base: &Base,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(Event),
    ) -> Result<Option<Adaptation>, Error> {
        info!("the base's own tasks, after and before");
        let (tasks, targets) = base.header().trained_tasks();
        let episodes = self.episodes();
        let mut play = |model: &Model<B>| {
            let progress = |done, total| watch(Event::Evaluation { done, total });
            evaluate::evaluate_all(model, &tasks, &targets, episodes, stop, progress)
        };
        let after = play(&self.model)?;
        // An adapter's B is 0 at first: it changes nothing.
        self.model.initialise(self.config.seed)?;
        base.start(&mut self.model)?;
        let before = match base.method() {
            Method::None => after.clone(),
            _ => play(&self.model)?,
        };
        let results = before.zip(after);
        Ok(results.map(|(before, after)| base.adaptation(&before, &after)))
    }
}

/// What an evaluation came to.
struct Results {
    played: Vec<TaskResult>,
    validation: Vec<Validation>,
}

/// What a run that fails leaves behind.
fn kept(folder: &Folder, saved_step: Option<u64>) -> String {
    match saved_step {
        Some(saved) => format!(
            "the checkpoint of step {saved} is in {}",
            folder.path().display()
        ),
        None => "no checkpoint had been written yet".to_owned(),
    }
}

/// An error of the backend in a step.
fn interrupted(
    folder: &Folder,
    saved_step: Option<u64>,
    step: u64,
) -> impl FnOnce(ModelError) -> Error + '_ {
    move |source| Error::Interrupted {
        step,
        source,
        kept: kept(folder, saved_step),
    }
}

/// What a picture of a run is called.
fn title_of(config: &Config) -> String {
    match (&config.task, &config.tasks[..]) {
        (Some(task), _) => task.name().to_owned(),
        (None, []) => "own demonstrations".to_owned(),
        (None, tasks) => format!("{} tasks", tasks.len()),
    }
}

/// The optimiser's numbers at one step (SPEC section 6).
fn optimiser_step(train: &TrainConfig, learning_rate: f64) -> OptimiserStep {
    OptimiserStep {
        learning_rate,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: match train.optimiser {
            OptimiserKind::Adam => 0.0,
            OptimiserKind::Adamw => train.weight_decay,
        },
        clip: (train.clip > 0.0).then_some(train.clip),
    }
}

/// Most tokens of an episode of which a map is drawn.
const MOST_DRAWN: usize = 2048;

/// Draws what the memory loss teaches beside its target: the first supervised head (or the first of
/// all), or the supervised memory's recall; for the first unseen episode of the first task, or for
/// its first demonstration if it is only a file.
fn draw_map<B: Backend>(
    config: &Config,
    model: &Model<B>,
    data: &Mixture,
    folder: &Folder,
) -> Result<(), Error> {
    let supervision = model.supervision();
    let layer = supervision.map_or(0, |supervision| supervision.layer);
    let head = match supervision.map(|supervision| &supervision.part) {
        Some(SupervisedPart::Memory) => None,
        Some(SupervisedPart::Heads(heads)) => heads.first().copied(),
        None => Some(0),
    };
    let (path, map_of, axes) = match head {
        Some(head) => (
            folder.attention(),
            format!("attention of layer {}, head {}", layer + 1, head + 1),
            ["attended", "attending"],
        ),
        None => (
            folder.recall(),
            format!("recall of layer {}'s memory", layer + 1),
            ["recalled", "recalling"],
        ),
    };
    let first = config.task_list().into_iter().next().unwrap_or_default();
    let unseen;
    let (trajectory, episode) = match &first.task {
        Some(task) => {
            let episode = task.demonstrate(Split::Evaluation, config.evaluation.seed, 0)?;
            let damaged = |error| Error::file(&path, "an unseen episode", error, "a whole episode");
            let mut set = Demonstrations::new(task.family()).map_err(damaged)?;
            set.push((&episode).into()).map_err(damaged)?;
            unseen = TrainingData::new(set, 1, first.data.return_scale);
            let family = model.spaces().position(&task.family()).unwrap_or_default();
            let trajectory = unseen.trajectory(0);
            let of_family = |trajectory| Trajectory {
                family,
                ..trajectory
            };
            (trajectory.map(of_family), "an unseen episode")
        }
        None => (
            data.trajectory(Chosen {
                task: 0,
                episode: 0,
            }),
            "the first demonstration",
        ),
    };
    let mut packer = model.packer();
    packer.clear();
    if let Some(trajectory) = trajectory {
        packer.push_trajectory(trajectory)?;
    }
    let tokens = packer.batch().tokens();
    if tokens > MOST_DRAWN {
        info!("no picture of the {map_of}: {tokens} tokens are more than {MOST_DRAWN}");
        return Ok(());
    }
    let batch = packer.batch();
    let map = match (supervision, head) {
        (None, Some(head)) => Some(model.attention_map(batch, layer, head)?),
        _ => model.supervised_maps(batch)?.into_iter().next(),
    };
    let map = map.unwrap_or_default();
    let title = format!("{}: {episode}", first.label.unwrap_or_default());
    let captions = plots::MapCaptions {
        title: &title,
        map: &map_of,
        axes,
    };
    let target = plots::target(batch, head.is_none());
    let maps = [map.view(), target.view()];
    plots::map(&path, captions, maps, config.model.layout.tokens_per_step())
}
