//! The command line: what is asked for, how it ends.
//!
//! Results go to standard output and nothing else does. Exit code 0 on success, 2 on misuse, 1 on
//! failure, with one line that says what is wrong.

mod about;
mod bench;
mod columns;
mod convert;
mod demo;
mod device;
mod devices;
mod encode;
mod eval;
mod finetune;
mod inspect;
mod labels;
mod made_up;
mod merge;
mod method;
mod model;
mod numbers;
mod output;
mod plot;
mod precision;
mod predict;
mod progress;
mod several;
mod study;
mod table;
mod targets;
mod task;
mod task_vectors;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Full-rank parameter-efficient fine-tuning (RandLoRA).
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Finetune(Box<finetune::Args>),
    Eval(eval::Args),
    Predict(predict::Args),
    Inspect(inspect::Args),
    Bench(bench::Args),
    Merge(merge::Args),
    Convert(convert::Args),
    Devices(devices::Args),
    Study(study::Args),
    Demo(demo::Args),
    /// One method of the demo, in a process of its own; the base's parameters come from standard input.
    #[command(hide = true)]
    DemoMethod(demo::MethodArgs),
}

/// Why a command failed, in one line.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs what the arguments ask for.
pub(crate) fn run() -> ExitCode {
    // Prints help, the version or what is wrong with the arguments (exit code 2), and ends there.
    let args = Args::parse();
    let result = match args.command {
        Command::Finetune(args) => finetune::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Predict(args) => predict::run(&args),
        Command::Study(args) => study::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::DemoMethod(args) => demo::run_method(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Devices(args) => devices::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Files may put line ends or a terminal's control characters into what is said of them.
            eprintln!("error: {}", failure.to_string().replace(char::is_control, " "));
            ExitCode::FAILURE
        }
    }
}
