//! The `dtmem` command.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use dtmem::experiment;
use dtmem::train::device::DeviceChoice;
use dtmem::train::finetune::Method;
use dtmem::verify::{BackendChoice, DtypeChoice};

mod commands;
mod info;
mod progress;

/// Train and examine agents that remember: DT-Mem and AttentionTuner.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    /// Number of threads; the results do not depend on it [default: one per core]
    #[arg(long, global = true, value_name = "N", display_order = 900)]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model as a configuration says, and evaluate it
    Train(Run),
    /// Adapt a trained model to another task, and see what it forgets
    Finetune(Finetune),
    /// Fold an adapter into its base
    Merge(Merge),
    /// Evaluate a trained model on unseen episodes
    Eval(Eval),
    /// Show one episode of a trained model: what it did, attended to and remembered
    Inspect(Inspect),
    /// Write a demonstration file, or show what is in one
    Demos(Demos),
    /// Run a grid of settings with several seeds; write a table, a CSV file and a picture
    #[command(after_help = experiment::overview())]
    Experiment(Experiment),
    /// Check numbers in fixture files against the reference and the backends
    Verify(Verify),
    /// Time the operations at named shapes, on the CPU and on a GPU
    Bench(Bench),
    /// Show version, features, CPU, GPUs and kernel images
    Info,
}

#[derive(Debug, Args)]
struct Run {
    /// Configuration, such as configs/hallway-quick.toml
    config: PathBuf,
    /// Set a key, such as train.steps=100; an empty value brings its default back
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Where to compute: auto (a GPU if one works), cpu or cuda:N
    #[arg(long, default_value_t)]
    device: DeviceChoice,
    /// Output folder [default: for NAME.toml runs/NAME, of finetune runs/NAME-METHOD]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Continue the run in the output folder
    #[arg(long)]
    resume: bool,
    /// Replace the run in the output folder
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
}

#[derive(Debug, Args)]
struct Finetune {
    #[command(flatten)]
    run: Run,
    /// Output folder of the run whose model is adapted
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// What is trained: lora (adapters on the memory), full, memory, scratch or none [default: lora]
    #[arg(long)]
    method: Option<Method>,
    /// Share of the demonstrations to learn from [default: 1]
    #[arg(long)]
    share: Option<f64>,
}

#[derive(Debug, Args)]
struct Merge {
    /// Output folder of the base's run
    base: PathBuf,
    /// Output folder of the adapter's run
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder for the merged model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace the run in that folder
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Args)]
struct Eval {
    /// Output folder of a run
    folder: PathBuf,
    /// Output folder of an adapter's run on it: evaluate with the adapter, on its task and on those
    /// of the base
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Where to compute: auto (a GPU if one works), cpu or cuda:N
    #[arg(long, default_value_t)]
    device: DeviceChoice,
    /// Number of episodes [default: as the run was configured]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    episodes: Option<u64>,
    /// Seed of the episodes [default: as the run was configured]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Return to ask for [default: as the run was configured]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    target_return: Option<f64>,
}

#[derive(Debug, Args)]
struct Inspect {
    /// Output folder of a run
    folder: PathBuf,
    /// Output folder of an adapter's run on it: inspect the model with the adapter in use
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Which episode of the run's evaluation
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// From there on, the first episode that fails
    #[arg(long)]
    failed: bool,
    /// Page to write [default: episode-S.html in the output folder, of the adapter if there is one]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Task to play: one of the run's, or such as hallway,length=2 [default: the first of the
    /// adapter's or of the run's]
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Where to compute: auto (a GPU if one works), cpu or cuda:N
    #[arg(long, default_value_t)]
    device: DeviceChoice,
}

#[derive(Debug, Args)]
struct Demos {
    /// hallway, counting, ordering or recall
    #[arg(required_unless_present = "inspect")]
    task: Option<String>,
    /// Show what is in a demonstration file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "out"])]
    inspect: Option<PathBuf>,
    /// File to write
    #[arg(long, value_name = "FILE", required_unless_present = "inspect")]
    out: Option<PathBuf>,
    /// Number of episodes
    #[arg(long, value_name = "N", default_value_t = 1000)]
    episodes: usize,
    /// Seed of the episodes
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Share of the episodes that keep their pairs
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    annotated: f64,
    /// hallway, counting, ordering: number of hallways, rooms, choices [default: the paper's]
    #[arg(long, value_name = "L")]
    length: Option<u64>,
    /// counting: probability of a test room
    #[arg(long, value_name = "P")]
    test_frequency: Option<f64>,
    /// counting: probability of an empty cell
    #[arg(long, value_name = "P")]
    empty_frequency: Option<f64>,
    /// recall: delayed or associative
    #[arg(long)]
    kind: Option<String>,
    /// recall: number of pairs
    #[arg(long, value_name = "N")]
    pairs: Option<u64>,
    /// recall: number of steps before the query
    #[arg(long, value_name = "K")]
    steps: Option<u64>,
}

#[derive(Debug, Args)]
struct Experiment {
    /// Which one, of those below
    name: experiment::Chosen,
    /// Small models and few steps: minutes on two cores [default]
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// As the papers, for a GPU
    #[arg(long)]
    full: bool,
    /// Seeds of each cell, from 0; more can be added later [default: those of the experiment]
    #[arg(long, value_name = "K")]
    seeds: Option<u64>,
    /// Set a key in every cell, such as train.steps=100
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Output folder; what is done there is not run again [default: runs/NAME-quick, runs/NAME-full]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where to compute: auto (a GPU if one works), cpu or cuda:N
    #[arg(long, default_value_t)]
    device: DeviceChoice,
    /// Run cells again whose result belongs to other settings
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Args)]
struct Verify {
    /// Fixture files (docs/fixtures.md)
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// reference, host, cuda or all
    #[arg(long, default_value = "all")]
    backend: BackendChoice,
    /// f64, f32, bf16, f16 or all
    #[arg(long, default_value = "all")]
    dtype: DtypeChoice,
}

#[derive(Debug, Args)]
struct Bench {
    /// File to write; scripts/bench-report makes a table and a picture of it
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to compute: auto (the CPU, and the first GPU if one works), cpu or cuda:N (and the CPU)
    #[arg(long, default_value_t)]
    device: DeviceChoice,
    /// Only rows whose operation/scale contains this
    #[arg(long, value_name = "NAME", default_value = "")]
    filter: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::in_pool(cli.threads, || match &cli.command {
        Command::Train(arguments) => commands::train(arguments),
        Command::Finetune(arguments) => commands::finetune(arguments),
        Command::Merge(arguments) => commands::merge(arguments),
        Command::Eval(arguments) => commands::eval(arguments),
        Command::Inspect(arguments) => commands::inspect(arguments),
        Command::Demos(arguments) => commands::demos(arguments),
        Command::Experiment(arguments) => commands::experiment(arguments),
        Command::Verify(arguments) => commands::verify(arguments),
        Command::Bench(arguments) => commands::bench(arguments),
        Command::Info => commands::info(),
    }) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
