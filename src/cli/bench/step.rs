//! Whole steps of training a model: forward, backward, clipping, AdamW.

use std::path::PathBuf;
use std::time::Instant;

use randlora::OpenClCounts;
use randlora::data::Batches;
use randlora::io::Access;
use randlora::models::Bert;
use randlora::nn::{Context, Module, TokenIds};
use randlora::optim::AdamW;
use randlora::train::{Flow, Trainer};
use serde_json::{Value, json};

use super::{asked, asked_lines, line, median, number};
use crate::cli::device::DeviceArgs;
use crate::cli::method::{BasesName, MethodName, Scale, Settings};
use crate::cli::model::{PeftDraw, with_threads};
use crate::cli::output::{count, peak_memory, say, size, table};
use crate::cli::precision::{self, PrecisionArgs};
use crate::cli::task_vectors::{self, Folders};
use crate::cli::{Failure, made_up, targets};

/// Measure whole training steps (forward, backward, clipping, AdamW) on random tokens, with the
/// dropout of the model's config.json.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora bench step --model all-MiniLM-L6-v2 --method randlora --rank 16 --targets all-linear \\
      --batch-size 32 --length 64
  randlora bench step --model all-MiniLM-L6-v2 --method full --checkpoint-activations --json")]
pub(super) struct Args {
    /// The model's folder: config.json, model.safetensors.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What is trained.
    #[arg(long, value_enum, default_value = "randlora")]
    method: MethodName,
    /// The rank: of one basis of RandLoRA, of the update of LoRA [default: 32 for randlora, 8 for lora].
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    rank: Option<u32>,
    #[arg(long, default_value = targets::DEFAULT, help = targets::HELP)]
    targets: String,
    /// RandLoRA's random bases [default: uniform].
    #[arg(long, value_enum)]
    bases: Option<BasesName>,
    #[arg(long, value_name = "DIR,…", value_delimiter = ',', help = task_vectors::HELP)]
    task_vectors: Vec<PathBuf>,
    /// Texts in a batch.
    #[arg(long, value_name = "B", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Tokens in each text.
    #[arg(long, value_name = "L", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    length: u32,
    /// Forget what is computed within the model's blocks, and compute it again when it is needed.
    #[arg(long)]
    checkpoint_activations: bool,
    /// How many steps are measured, after two that are not.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// The threads to compute with; all cores by default.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Steps in which memory is had for the first time.
const WARM_UP: usize = 2;

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let value = with_threads(args.threads, || measure(args))??;
    Ok(say(if args.json { value.to_string() } else { text(&value).trim_end().to_string() })?)
}

fn measure(args: &Args) -> Result<Value, Failure> {
    let (method, device) = (args.method, args.device.open(&args.precision)?);
    let [rows, length, steps] = [args.batch_size, args.length, args.steps].map(|n| n as usize);
    let rank = args.rank.map(|rank| rank as usize).or(method.default_rank());
    let Args { targets, bases, task_vectors, .. } = args;
    let settings = Settings {
        method,
        targets,
        rank,
        scale: Scale::Auto,
        bases: *bases,
        dropout: 0.0,
        seed: 0,
        coefficients: None,
        // How many there will be changes nothing of the first.
        steps: 1000,
        vectors: Folders { folders: task_vectors, draw: PeftDraw::default(), access: Access::Map },
    };
    let mut model = made_up::model(&args.model, Access::Map, None, &settings, &device)?;
    made_up::check_length(&args.model, length, model.config())?;

    let texts = made_up::texts(rows, length, model.config());
    let texts: Vec<&TokenIds> = texts.iter().collect();
    let loss = |model: &Bert, _: &[usize], ctx: &Context| made_up::loss(model, &texts, ctx);
    let batches = Batches::new(rows, rows, 0)?;
    let mut trainer = Trainer {
        clip: Some(1.0),
        checkpoint_activations: args.checkpoint_activations,
        ..Trainer::new(AdamW::new(), 1e-4, WARM_UP + steps)
    };
    let (mut times, mut start) = (vec![], Instant::now());
    let mut before = OpenClCounts::default();
    trainer.fit(&mut model, &batches, loss, |_, _| {
        device.synchronize()?;
        if times.len() < WARM_UP {
            before = device.opencl_counts();
        }
        times.push(start.elapsed().as_secs_f64());
        start = Instant::now();
        Ok(Flow::Continue)
    })?;
    let step_ms = median(times.split_off(WARM_UP));
    Ok(json!({
        "method": method.name(),
        "rank": rank,
        "bases": (method == MethodName::Randlora).then(|| args.bases.unwrap_or_default().name()),
        "precision": precision::done(&device).to_string(),
        "device": device.to_string(),
        "batch_size": rows,
        "length": length,
        "threads": rayon::current_num_threads(),
        "steps": steps,
        "checkpoint_activations": args.checkpoint_activations,
        "trained_parameters": model.trainable_count(),
        "step_ms": step_ms,
        "tokens_per_s": (rows * length) as f64 / step_ms * 1e3,
        "tensor_peak_bytes": device.memory().peak_bytes,
        "peak_rss_bytes": peak_memory(),
        "opencl": asked(&device, before, steps),
    }))
}

/// The same to read.
fn text(value: &Value) -> String {
    let whole = |field: &str| value[field].as_u64().unwrap_or(0);
    let rank = value["rank"].as_u64().map_or(String::new(), |rank| format!(", rank {rank}"));
    let bases = value["bases"].as_str().map_or(String::new(), |bases| format!(", {bases} bases"));
    let mut lines = vec![
        line("method", format!("{}{rank}{bases}", value["method"].as_str().unwrap_or_default())),
        line("trained", count(whole("trained_parameters"))),
        line("batch", format!("{} texts of {} tokens", whole("batch_size"), whole("length"))),
        line("threads", count(whole("threads"))),
        line("step", format!("{:.1} ms", number(value, "step_ms"))),
        line("tokens/s", count(number(value, "tokens_per_s") as u64)),
        line("tensors", format!("{} at most", size(whole("tensor_peak_bytes")))),
    ];
    if let Some(bytes) = value["peak_rss_bytes"].as_u64() {
        lines.push(line("process", format!("{} at most", size(bytes))));
    }
    lines.extend(asked_lines(value));
    table(&lines)
}
