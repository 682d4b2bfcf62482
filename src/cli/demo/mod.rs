//! `randlora demo`: RandLoRA next to its alternatives, on real data, in under a minute.
//!
//! A small vision transformer learns to read 1,077 handwritten digits from scratch. Then the same
//! digits come mirrored along the diagonal and in white on black: a shift that an old archive or a
//! wrongly mounted camera makes, that changes every pixel and the place of every patch, and under
//! which the base is hardly better than guessing. The classes are the same and the information is
//! all there, so a method's accuracy shows how well it can rearrange what the base has learned.
//! A probe, which trains the classifier alone, is what any adapter has to beat; full fine-tuning
//! is what it can hope for.
//!
//! Learning rates are chosen per method on a validation split; the table is about a test split that
//! nothing was chosen by. Each method runs in a process of its own, whose peak memory is measured.

mod experiment;
mod plot;
mod report;
mod vectors;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use serde_json::{Value, json};

use super::Failure;
use super::numbers::rate;
use super::output::{peak_memory, say};
use super::progress::Progress;
use experiment::{ATLAS, DEFAULT, Experiment, METHODS, Method, SEEDS, numbers};

/// Adapt a small vision transformer to a shifted task by a probe, LoRA, RandLoRA and full
/// fine-tuning: a table, pictures of the curves, all numbers as JSON.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  randlora demo\n  randlora demo --out results\n  randlora demo --methods lora,dora,vera,randlora"
)]
pub(crate) struct Args {
    /// The folder to write curves and numbers to; files in it are overwritten.
    #[arg(long, value_name = "DIR", default_value = "demo-out")]
    out: PathBuf,
    /// The methods to show, with commas between: those of `finetune`, where `probe` trains the classifier
    /// alone. More of them take longer. atlas combines two models that it makes first, which were fine-tuned on
    /// digits that are mirrored alone and negatives alone.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_values = DEFAULT)]
    methods: Vec<String>,
    /// The learning rates to choose from, with commas between, instead of each method's own.
    #[arg(long, value_name = "RATES", value_delimiter = ',', value_parser = rate)]
    lr: Vec<f64>,
    /// How many trainings each learning rate is judged by.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10))]
    choosing_seeds: u64,
}

/// Which method a process is for.
#[derive(Debug, clap::Args)]
pub(crate) struct MethodArgs {
    name: String,
    choosing_seeds: u64,
    #[arg(value_parser = rate)]
    lr: Vec<f64>,
}

/// Runs the whole demo.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let methods = args.methods.iter().map(|name| known(name)).collect::<Result<Vec<Method>, Failure>>()?;
    // Before any work: a folder that cannot be written to is better known now.
    std::fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    let start = Instant::now();
    let experiment = Experiment::new();
    let tried = |m: &Method| m.rates(&args.lr).len() * args.choosing_seeds as usize;
    let runs: usize = methods.iter().map(|m| tried(m) + SEEDS.len()).sum();
    let vectors = if methods.iter().any(|m| m.name == ATLAS) { experiment.vector_steps() } else { 0 };
    let progress = Progress::new(experiment.base_steps() + vectors + runs as u64 * experiment.steps());

    progress.stage("training the base from scratch on upright digits");
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let (model, base, new_task) =
        one_thread.install(|| experiment.base(&mut |steps| progress.advance(steps)))?;
    let parameters = numbers(&model)?;
    let methods = all_methods(&methods, args, &parameters, &progress)?;
    progress.finish();

    let results = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "seconds": start.elapsed().as_secs_f64(),
        "base": {
            "parameters": parameters.len(),
            "accuracy": base.test,
            "accuracy_on_new_task": new_task,
            "losses": base.losses,
        },
        "methods": methods,
    });
    say(report::table(&results)?.trim_end())?;
    let written = [
        plot::losses(&results, &args.out.join("loss.svg"))?,
        plot::accuracies(&results, &args.out.join("accuracy.svg"))?,
        plot::rates(&results, &args.out.join("rates.svg"))?,
        report::write(&results, &args.out.join("demo.json"))?,
    ];
    eprintln!("written: {}", written.map(|path| path.display().to_string()).join(", "));
    Ok(())
}

/// The method of a name.
fn known(name: &str) -> Result<Method, Failure> {
    let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
    let found = METHODS.into_iter().find(|method| method.name == name);
    found.ok_or_else(|| format!("the demo has no method `{name}`; there are: {}", names.join(", ")).into())
}

/// Runs the methods beside each other, as many at a time as there are cores. A model this small
/// leaves a second thread little to do, so each process has one.
fn all_methods(
    methods: &[Method],
    args: &Args,
    base: &[f32],
    progress: &Progress,
) -> Result<Vec<Value>, Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let waiting = Mutex::new(methods.iter().enumerate());
    let outcomes = Mutex::new(vec![None; methods.len()]);
    let work = || -> Result<(), String> {
        loop {
            let next = waiting.lock().map_err(|e| e.to_string())?.next();
            let Some((i, method)) = next else { return Ok(()) };
            progress.stage(&format!("adapting it to mirrored negatives: {}", method.name));
            let outcome = in_own_process(method, args, base, progress).map_err(|e| e.to_string())?;
            outcomes.lock().map_err(|e| e.to_string())?[i] = Some(outcome);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores.min(methods.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker failed".to_string())?)
    })?;
    let outcomes = outcomes.into_inner().map_err(|e| e.to_string())?;
    Ok(outcomes.into_iter().flatten().collect())
}

/// Runs this program again for one method and collects what it reports.
fn in_own_process(method: &Method, args: &Args, base: &[f32], progress: &Progress) -> Result<Value, Failure> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["demo-method", method.name, &args.choosing_seeds.to_string()])
        .args(args.lr.iter().map(f64::to_string))
        .env("RAYON_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        let bytes: Vec<u8> = base.iter().flat_map(|v| v.to_le_bytes()).collect();
        stdin.write_all(&bytes)?;
    }
    let mut outcome = None;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let mut message: Value = serde_json::from_str(&line?)?;
            match message.get("steps").and_then(Value::as_u64) {
                Some(steps) => progress.advance(steps),
                None => outcome = Some(message.take()),
            }
        }
    }
    let status = child.wait()?;
    match outcome {
        Some(outcome) if status.success() => Ok(outcome),
        _ => Err(format!("the process for the method {} failed ({status})", method.name).into()),
    }
}

/// One method, in the process made for it: steps and the outcome as lines of JSON.
pub(crate) fn run_method(args: &MethodArgs) -> Result<(), Failure> {
    let method = known(&args.name)?;
    let mut bytes = vec![];
    std::io::stdin().read_to_end(&mut bytes)?;
    let base: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let experiment = Experiment::new();
    let mut waiting = 0;
    let choosing = (method.rates(&args.lr), args.choosing_seeds);
    let outcome = experiment.adapt(&base, &method, choosing, &mut |steps| {
        waiting += steps;
        if waiting >= 20 {
            // What cannot be said now cannot be said at the end either, and is an error there.
            drop(say(json!({ "steps": std::mem::take(&mut waiting) })));
        }
    })?;
    say(json!({ "steps": waiting }))?;
    Ok(say(report::outcome(method.name, &outcome, peak_memory()))?)
}
