//! `randlora convert`: an adapter in another form.

use std::fs;
use std::path::{Path, PathBuf};

use randlora::adapters::{LayerInfo, Lora, LoraAdapter};
use randlora::analysis::{low_rank, norm};
use randlora::io::{Access, Adapter, Checkpoint, PeftTask, save_compact, save_peft};
use randlora::models::Bert;
use randlora::nn::{ItemMut, Linear, LinearAdapter, Module};
use randlora::{DType, Device, Error, Result};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::Failure;
use super::model::{PeftDraw, adapted};
use super::output::{check_folder, say, table};
use super::table::wrong;

/// Write an adapter in another form: compact (RandLoRA's seed and diagonals alone), PEFT's with all of the bases, or
/// as a LoRA that comes as near as its rank allows.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora convert sst2/best --to compact --out sst2-compact
  randlora convert sst2-compact --to peft --model all-MiniLM-L6-v2 --out sst2-peft
  randlora convert sst2/best --to lora --rank 16 --out sst2-lora

An adapter that PEFT saved becomes compact where its bases are those of its `projection_prng_key`.")]
pub(crate) struct Args {
    /// The adapter's folder, as this program or PEFT wrote it.
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// The form to write.
    #[arg(long, value_enum)]
    to: Form,
    /// The folder to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The model that the adapter is for [default: the one that the adapter names].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The rank of the LoRA.
    #[arg(long, value_name = "R", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// Write into a folder that exists; its files of the same names are replaced.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    draw: PeftDraw,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A form of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// RandLoRA without its bases: compact.safetensors.
    Compact,
    /// PEFT's two files, with RandLoRA's bases.
    Peft,
    /// A LoRA of the rank that `--rank` says, nearest to each layer's update.
    Lora,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> std::result::Result<(), Failure> {
    check_folder(&args.out, args.force)?;
    let adapter = args.draw.open(&args.adapter)?;
    let checkpoint = Checkpoint::open(&model(args, &adapter)?, Access::Map)?;
    let mut model = adapted(&checkpoint, Some(&adapter), &Device::cpu())?;
    let base_model = adapter.base_model();
    let mut errors = vec![];
    match args.to {
        Form::Compact => save_compact(&model, &args.out, base_model)?,
        Form::Peft => save_peft(&model, &args.out, &task(&adapter))?,
        Form::Lora => {
            errors = approximate(&mut model, args.rank as usize)?;
            save_peft(&model, &args.out, &task(&adapter))?;
        }
    }
    copy_about(&args.adapter, &args.out)?;
    report(args, &errors)?;
    eprintln!("written: {}", args.out.display());
    Ok(())
}

/// The model's folder, as it was given or as the adapter names it.
fn model(args: &Args, adapter: &Adapter) -> Result<PathBuf> {
    let named = adapter.base_model().map(PathBuf::from);
    match args.model.clone().or(named.filter(|path| path.is_dir())) {
        Some(model) => Ok(model),
        None => {
            let named = adapter.base_model().unwrap_or("no model");
            let message =
                format!("the adapter names {named}, which is no folder here: give its model with `--model`");
            Err(wrong(&args.adapter, message))
        }
    }
}

/// With a task PEFT expects a classifier in the file.
fn task(adapter: &Adapter) -> PeftTask {
    let classifier = adapter.whole().iter().any(|(name, _)| *name == "classifier.weight");
    PeftTask {
        name: classifier.then(|| "SEQ_CLS".into()),
        base_model: adapter.base_model().map(String::from),
    }
}

/// The task and the labels go along.
fn copy_about(from: &Path, to: &Path) -> Result<()> {
    let source = from.join("randlora.json");
    if source.is_file() {
        let bytes = fs::read(&source).map_err(|e| Error::Io { path: source, source: e })?;
        randlora::io::write_whole(&to.join("randlora.json"), |out| out.write_all(&bytes))?;
    }
    Ok(())
}

/// Puts the nearest LoRA in the place of every adapter; the layers' names with ‖ΔW − BA‖/‖ΔW‖.
fn approximate(model: &mut Bert, rank: usize) -> Result<Vec<(String, f64)>> {
    let layers: Vec<(String, &Linear)> =
        model.linears().into_iter().filter(|(_, layer)| layer.adapter().is_some()).collect();
    let near: Vec<(String, LoraAdapter, f64)> =
        layers.par_iter().map(|(name, layer)| near(name, layer, rank)).collect::<Result<_>>()?;
    let errors = near.iter().map(|(name, _, error)| (name.clone(), *error)).collect();
    let mut near = near.into_iter().peekable();
    model.try_visit_mut(&mut |name, item| match item {
        ItemMut::Linear(layer) => match near.next_if(|(of, _, _)| of == name) {
            Some((_, lora, _)) => {
                layer.detach();
                layer.attach(Box::new(lora))
            }
            None => Ok(()),
        },
        ItemMut::Parameter(_) => Ok(()),
    })?;
    Ok(errors)
}

/// The LoRA of a rank that is nearest to a layer's update, and how far it is from it.
fn near(name: &str, layer: &Linear, rank: usize) -> Result<(String, LoraAdapter, f64)> {
    let weight = layer.weight().value();
    let Some(adapter) = layer.adapter() else {
        return Err(wrong(Path::new(name), "the layer has no adapter"));
    };
    let delta = adapter.delta(weight)?;
    let (b, a) = low_rank(&delta, rank)?;
    let info = LayerInfo {
        name: name.into(),
        inputs: layer.inputs(),
        outputs: layer.outputs(),
        dtype: DType::F32,
        device: delta.device().clone(),
        weight: weight.clone(),
    };
    let mut lora = LoraAdapter::new(&Lora { rank: a.dims()[0], scale: 1.0, dropout: 0.0, seed: 0 }, &info)?;
    for ((_, parameter), value) in lora.parameters_mut().into_iter().zip([a, b]) {
        parameter.set(value.to_dtype(DType::F32)?)?;
    }
    let (left, size) = (norm(&lora.delta(weight)?.sub(&delta)?)?, norm(&delta)?);
    Ok((name.into(), lora, if size > 0.0 { left / size } else { 0.0 }))
}

fn report(args: &Args, errors: &[(String, f64)]) -> Result<()> {
    let bytes: u64 = ["compact.safetensors", "adapter_model.safetensors"]
        .iter()
        .filter_map(|name| Some(fs::metadata(args.out.join(name)).ok()?.len()))
        .sum();
    let of_layer = |(name, error): &(String, f64)| json!({ "name": name, "error": error });
    let layers: Vec<Value> = errors.iter().map(of_layer).collect();
    if args.json {
        return say(json!({ "bytes": bytes, "layers": layers }));
    }
    if !errors.is_empty() {
        let mut lines = vec![vec!["layer".to_string(), ">‖ΔW − BA‖/‖ΔW‖".to_string()]];
        lines.extend(errors.iter().map(|(name, error)| vec![name.clone(), format!("{error:.4}")]));
        say(table(&lines).trim_end())?;
    }
    say(super::output::size(bytes))
}
