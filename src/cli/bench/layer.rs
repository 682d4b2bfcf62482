//! One linear layer, forward and backward, by every method.

use std::any::Any;

use randlora::adapters::{self, Full, Lora, Method, RandLora, RandLoraAdapter, Targets};
use randlora::nn::{Context, Init, Linear, Module};
use randlora::{Device, Form, Plan, Result, Sizes, Wants, Way};
use serde_json::{Value, json};

use super::{asked, asked_lines, line, medians, number};
use crate::cli::device::DeviceArgs;
use crate::cli::method::BasesName;
use crate::cli::model::with_threads;
use crate::cli::precision::{self, PrecisionArgs};
use crate::cli::{Failure, output};

/// Measure a linear layer, forward and backward: frozen, trained whole, with LoRA, with RandLoRA.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora bench layer --tokens 2048 --in 768 --out 768 --rank 32
  randlora bench layer --tokens 256 --in 768 --out 3072 --rank 16 --threads 1 --json")]
pub(super) struct Args {
    /// Rows of the input.
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// The width of the input.
    #[arg(long = "in", value_name = "I", value_parser = clap::value_parser!(u32).range(1..))]
    inputs: u32,
    /// The width of the output.
    #[arg(long = "out", value_name = "O", value_parser = clap::value_parser!(u32).range(1..))]
    outputs: u32,
    /// The rank: of one basis of RandLoRA, of the update of LoRA.
    #[arg(long, value_name = "R", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// RandLoRA's random bases.
    #[arg(long, value_enum, default_value = "uniform")]
    bases: BasesName,
    /// The share of the adapters' inputs that is dropped.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
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

pub(super) fn run(args: &Args) -> std::result::Result<(), Failure> {
    let value = with_threads(args.threads, || measure(args))??;
    Ok(output::say(if args.json { value.to_string() } else { text(&value).trim_end().to_string() })?)
}

fn measure(args: &Args) -> Result<Value> {
    let [tokens, inputs, outputs, rank] =
        [args.tokens, args.inputs, args.outputs, args.rank].map(|n| n as usize);
    let (sizes, dropout) = (Sizes { tokens, inputs, outputs, rank }, args.dropout);
    let device = args.device.open(&args.precision)?;
    let init = Init::seeded(0, &device);
    let (x, dy) =
        (init.normal("x", [tokens, inputs], 1.0)?.track(), init.normal("dy", [tokens, outputs], 1.0)?);
    let frozen = {
        let mut layer = Linear::init(&init, inputs, outputs, true)?;
        layer.freeze();
        layer
    };
    let with = |method: &dyn Method| -> Result<Linear> {
        let mut layer = frozen.clone();
        adapters::attach(&mut layer, method, &Targets::AllLinear, &[])?;
        Ok(layer)
    };
    let full = with(&Full)?;
    let lora = with(&Lora { rank, dropout, ..Lora::default() })?;
    let (distribution, structure) = args.bases.kind(sizes.small());
    let randlora = with(&RandLora { rank, dropout, distribution, structure, ..RandLora::default() })?;

    let pass = |layer: &Linear| layer.forward(&x, &Context::train(0, 0))?.backward_from(&dy).map(drop);
    // The bases come to a device when they are first used.
    pass(&randlora)?;
    device.reset_peaks();
    let before = device.opencl_counts();
    pass(&randlora)?;
    let asked = asked(&device, before, 1);
    let memory = device.memory();
    let scratch = match device {
        _ if asked.is_null() => memory.scratch_peak_bytes,
        // The gradients of the diagonals and of x, and y, are in it.
        _ => memory.peak_bytes - memory.live_bytes,
    };
    let [frozen_ms, full_ms, lora_ms, randlora_ms] = medians(
        args.rounds as usize,
        &device,
        [&mut || pass(&frozen), &mut || pass(&full), &mut || pass(&lora), &mut || pass(&randlora)],
    )?;

    let wants = Wants { diagonals: true, input: true, dropout: dropout > 0.0 };
    let form = form(&randlora, &device).unwrap_or(structure.into());
    let (plan, flops) = (Plan::new(sizes, wants, form), Plan::frozen_flops(sizes, wants));
    let ratio = 1.0 + plan.extra_flops(sizes, wants) / flops;
    Ok(json!({
        "tokens": tokens,
        "in": inputs,
        "out": outputs,
        "rank": rank,
        "bases": args.bases.name(),
        "precision": precision::done(&device).to_string(),
        "device": device.to_string(),
        "dropout": dropout,
        "threads": rayon::current_num_threads(),
        "rounds": args.rounds,
        "frozen_ms": frozen_ms,
        "full_ms": full_ms,
        "lora_ms": lora_ms,
        "randlora_ms": randlora_ms,
        "lora_factor": lora_ms / frozen_ms,
        "randlora_factor": randlora_ms / frozen_ms,
        "flop_ratio": ratio,
        "route": { "forward": name(plan.forward), "backward": name(plan.backward) },
        "frozen_gflops": flops / frozen_ms / 1e6,
        "gflops": ratio * flops / randlora_ms / 1e6,
        "scratch_bytes": scratch,
        "opencl": asked,
    }))
}

/// How a layer's bases are stored, which its plan follows from.
fn form(layer: &Linear, device: &Device) -> Option<Form> {
    let adapter: &dyn Any = layer.adapter()?;
    adapter.downcast_ref::<RandLoraAdapter>().map(|adapter| adapter.bases().form_on(device))
}

fn name(way: Way) -> &'static str {
    match way {
        Way::Panel => "panel",
        Way::Factored => "factored",
    }
}

/// The same to read.
fn text(value: &Value) -> String {
    let frozen = number(value, "frozen_ms");
    let mut lines = vec![["layer", ">ms", ">over frozen"].map(String::from).to_vec()];
    for (what, field) in
        [("frozen", "frozen_ms"), ("full", "full_ms"), ("lora", "lora_ms"), ("randlora", "randlora_ms")]
    {
        let ms = number(value, field);
        lines.push(vec![what.into(), format!("{ms:.2}"), format!("{:.2}", ms / frozen)]);
    }
    let ways = ["forward", "backward"].map(|half| value["route"][half].as_str().unwrap_or_default());
    let mut about = vec![
        line(
            "shape",
            format!("{} tokens, {} → {}, rank {}", value["tokens"], value["in"], value["out"], value["rank"]),
        ),
        line("threads", value["threads"].to_string()),
        line("bases", value["bases"].as_str().unwrap_or_default()),
        line("route", format!("{} forward, {} backward", ways[0], ways[1])),
        line("operations", format!("{:.2} times the frozen layer's", number(value, "flop_ratio"))),
        line(
            "GFLOP/s",
            format!("{:.0}, frozen {:.0}", number(value, "gflops"), number(value, "frozen_gflops")),
        ),
        line("scratch", output::size(value["scratch_bytes"].as_u64().unwrap_or(0))),
    ];
    about.extend(asked_lines(value));
    format!("{}\n{}", output::table(&about), output::table(&lines))
}
