//! `randlora study`: methods compared on tasks, learning rate by learning rate and seed by seed.
//!
//! A study is a list of trainings, of which each is a process of its own (`finetune`, then `eval` on rows of the
//! training file that were held out, and on the validation file). What came of one is a line of runs.jsonl with
//! all its settings, written when it ends: a study that is started again makes the trainings that are missing,
//! whatever stopped it, and one with more methods, rates or seeds makes those alone.
//!
//! Every learning rate is tried with the first seeds; the one that is best on the held-out rows is then trained
//! with all, and the table says how these do on the validation file, by which nothing was chosen.

mod entry;
mod record;
mod report;
mod task;
mod training;

use std::path::PathBuf;
use std::sync::Mutex;

use serde_json::Value;

use super::Failure;
use super::numbers::rate;
use super::output::say;
use super::targets;
use entry::{Entry, Ranks};
use record::Record;
use task::{Task, TaskSpec};
use training::Training;

/// Compare methods on tasks: learning rates by held-out rows, then mean and spread over seeds.
///
/// Interrupt it whenever you like: started again with the same arguments, it goes on where it was.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora study --model all-MiniLM-L6-v2 --task sst2 --task cola,text=4,label=2,no-header,metric=matthews \\
      --targets all-linear --rank 16 --group-by-length --jobs 2 --out study
  randlora study --model all-MiniLM-L6-v2 --task sst2 --methods lora,randlora,randlora:block,randlora@peft \\
      --lr 3e-4,1e-3,3e-3 --choosing-seeds 3 --max-train 1500 --out scale

What is written to OUT: runs.jsonl, a line for each training; table.md; a picture of the scores over the
learning rate for each task; data, the rows of each task.")]
pub(crate) struct Args {
    /// The model's folder: config.json, model.safetensors, tokenizer.json.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A task: a folder with train.tsv and validation.tsv or dev.tsv (or .csv, .jsonl), and if need be where its
    /// columns are and what counts: `DIR,text=4,label=2,no-header,metric=matthews`; also pair= and regress.
    /// May be given several times.
    #[arg(long, value_name = "DIR[,…]", required = true)]
    task: Vec<TaskSpec>,
    /// The folder to write to, and to go on from.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The methods of `finetune`, with commas between; RandLoRA with its bases and scale, as in
    /// `randlora:block@peft`. atlas, which needs task vectors, is none of them [default: all].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    methods: Vec<Entry>,
    #[arg(long, default_value = targets::DEFAULT, help = targets::HELP)]
    targets: String,
    /// RandLoRA's rank. That of lora, rslora, dora and pissa follows from it, so that they train as many numbers.
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// The learning rates to choose from [default: three for each method].
    #[arg(long, value_name = "RATES", value_delimiter = ',', value_parser = rate)]
    lr: Vec<f64>,
    /// The seeds: 0 and up.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    seeds: u32,
    /// The seeds with which every learning rate is tried.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    choosing_seeds: u32,
    /// The rows of the training file that learning rates are chosen by.
    #[arg(long, value_name = "N", default_value_t = 1500, value_parser = clap::value_parser!(u32).range(1..))]
    held_out: u32,
    /// The most rows of the others to train on.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_train: Option<u32>,
    /// How many times every example is seen.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Examples in a batch.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// The most tokens of a text.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(3..))]
    max_length: u32,
    /// Put texts of similar length into a batch: less padding, so less time.
    #[arg(long)]
    group_by_length: bool,
    /// Trainings at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// The threads of each.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Train nothing: the table and the pictures of what there is.
    #[arg(long)]
    report: bool,
}

/// A learning rate, and what came of its trainings.
type Known = (f64, Vec<Value>);

/// A study with its files open.
struct Study<'a> {
    args: &'a Args,
    ranks: Ranks,
    tasks: &'a [Task],
    entries: &'a [Entry],
    record: Record,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let twice = |i: usize| args.task[..i].iter().any(|task| task.name == args.task[i].name);
    if let Some(i) = (0..args.task.len()).find(|&i| twice(i)) {
        let message = "two folders of this name: results are kept by it, so rename one";
        return Err(format!("--task {}: {message}", args.task[i].name).into());
    }
    let data = args.out.join("data");
    std::fs::create_dir_all(&data).map_err(|e| format!("{}: {e}", data.display()))?;
    let ranks = Ranks::of(&entry::open(&args.model)?, &args.targets, args.rank as usize)?;
    let most = args.max_train.map(|rows| rows as usize);
    let prepare = |task: &TaskSpec| task.prepare(&data, args.held_out as usize, most);
    let tasks = args.task.iter().map(prepare).collect::<randlora::Result<Vec<Task>>>()?;
    let all = || entry::methods().map(|method| method.name().parse());
    let entries = match args.methods.is_empty() {
        true => all().collect::<Result<Vec<Entry>, String>>()?,
        false => args.methods.clone(),
    };
    let record = Record::open(&args.out.join("runs.jsonl"))?;
    let study = Study { args, ranks, tasks: &tasks, entries: &entries, record };
    if !args.report {
        study.train(&study.choosing())?;
        study.train(&study.judging())?;
    }
    let table = study.table();
    let written = study.write(&args.out, &table)?;
    say(table.trim_end())?;
    eprintln!(
        "written: {}",
        written.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

impl<'a> Study<'a> {
    fn seeds(&self) -> Vec<u64> {
        (0..self.args.seeds.into()).collect()
    }

    fn choosing_seeds(&self) -> Vec<u64> {
        (0..self.args.choosing_seeds.min(self.args.seeds).into()).collect()
    }

    /// The learning rates that are tried, from the smallest.
    fn rates(&self, entry: &Entry) -> Vec<f64> {
        let mut rates = if self.args.lr.is_empty() { entry.rates() } else { self.args.lr.clone() };
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        rates
    }

    fn training(&self, task: &'a Task, entry: &'a Entry, rate: f64, seed: u64) -> Training<'a> {
        Training { args: self.args, ranks: self.ranks, task, entry, rate, seed }
    }

    /// What came of the trainings that have ended, for each learning rate.
    fn known(&self, task: &Task, entry: &Entry, seeds: &[u64]) -> Vec<Known> {
        let result = |rate, &seed: &u64| {
            let training = Training { args: self.args, ranks: self.ranks, task, entry, rate, seed };
            self.record.result(&training.settings())
        };
        let results = |rate| (rate, seeds.iter().filter_map(|seed| result(rate, seed)).collect());
        self.rates(entry).into_iter().map(results).collect()
    }

    /// Every learning rate, with the first seeds. A seed of all comes before the next of any, so that what is
    /// there after an interruption can be compared.
    fn choosing(&self) -> Vec<Training<'a>> {
        let mut trainings = vec![];
        for seed in self.choosing_seeds() {
            for task in self.tasks {
                for entry in self.entries {
                    trainings
                        .extend(self.rates(entry).iter().map(|&rate| self.training(task, entry, rate, seed)));
                }
            }
        }
        trainings
    }

    /// The chosen learning rates, with all seeds.
    fn judging(&self) -> Vec<Training<'a>> {
        let mut trainings = vec![];
        for seed in self.seeds() {
            for task in self.tasks {
                for entry in self.entries {
                    let rate = report::choose(&self.known(task, entry, &self.choosing_seeds()));
                    trainings.extend(rate.map(|rate| self.training(task, entry, rate, seed)));
                }
            }
        }
        trainings
    }

    /// Makes those of these trainings that are missing, several at a time.
    fn train(&self, trainings: &[Training]) -> Result<(), Failure> {
        let missing: Vec<&Training> =
            trainings.iter().filter(|training| self.record.result(&training.settings()).is_none()).collect();
        let count = missing.len();
        let waiting = Mutex::new(missing.into_iter().zip(1..));
        let work = |worker: u16| -> Result<(), String> {
            loop {
                let next = waiting.lock().map_err(|e| e.to_string())?.next();
                let Some((training, place)) = next else { return Ok(()) };
                if let Err(failure) = self.one(training, worker, (place, count)) {
                    // The others end with what they are at.
                    waiting.lock().map_err(|e| e.to_string())?.by_ref().for_each(drop);
                    return Err(failure.to_string());
                }
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..self.args.jobs).map(|worker| scope.spawn(move || work(worker))).collect();
            workers.into_iter().try_for_each(|worker| {
                worker.join().map_err(|_| Failure::from("a worker failed"))?.map_err(Failure::from)
            })
        })
    }

    fn one(&self, training: &Training, worker: u16, (place, count): (usize, usize)) -> Result<(), Failure> {
        let result = training.run(&self.args.out.join(format!(".training-{worker}")))?;
        let Training { task, entry, rate, seed, .. } = training;
        let score =
            |field: &str| result[field].as_f64().map_or("diverged".into(), |score| format!("{score:.4}"));
        eprintln!(
            "{place} of {count}: {}, {entry}, lr {rate:e}, seed {seed}: {} {} held out, {} on validation",
            task.name,
            task.metric,
            score("held_out"),
            score("validation")
        );
        Ok(self.record.add(&training.settings(), result)?)
    }
}
