//! `randlora merge`: an adapter worked into the weights of its model.
//!
//! With `--json` one object: `layers` (how many were merged), `dtype`, `lost` and `worst` {`layer`, `lost`}: the share
//! of ΔW that rounding lost, in all layers together and in the layer that lost most, in Frobenius norms;
//! `difference`: how far the merged model's outputs are from the adapted one's at most, for 8 texts.

use std::path::PathBuf;

use randlora::adapters::merge;
use randlora::models::{Bert, Head};
use randlora::nn::{Context, Module, TokenBatch, TokenIds};
use randlora::{DType, Device, Error, Result};
use serde_json::json;

use super::about::About;
use super::model::{ModelArgs, by_name, with_adapters};
use super::output::{check_folder, say};
use super::several::MixArgs;
use super::{Failure, table::wrong};

/// Work an adapter into the weights of its model: writes a model folder that transformers loads, and that costs no
/// more to run than the model did.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora merge --model all-MiniLM-L6-v2 --adapter sst2/best --out sst2-merged
  randlora merge --model all-MiniLM-L6-v2 --adapter sst2/best --out sst2-merged --dtype bf16
  randlora merge --model all-MiniLM-L6-v2 --adapter a=seed1/best --adapter b=seed2/best --weights 0.5,0.5 --head sum \
    --out both-merged
  randlora predict --model sst2-merged 'a gripping film'")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    mix: MixArgs,
    /// The folder to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write into a folder that exists; its files of the same names are replaced.
    #[arg(long)]
    force: bool,
    /// The type of the merged model's numbers [default: that of the model's matrices].
    #[arg(long, value_enum)]
    dtype: Option<Type>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A type that a model is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

impl Type {
    fn dtype(self) -> DType {
        match self {
            Type::F32 => DType::F32,
            Type::F16 => DType::F16,
            Type::Bf16 => DType::BF16,
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> std::result::Result<(), Failure> {
    check_folder(&args.out, args.force)?;
    args.model.with_threads(|| merged(args))?.map_err(Failure::from)
}

fn merged(args: &Args) -> Result<()> {
    let opened = args.model.open_adapters()?;
    if opened.is_empty() {
        return Err(Error::Config { what: "--adapter", message: "name the adapter's folder".into() });
    }
    let uses = args.mix.uses(&args.model, &opened)?;
    let [chosen] = &uses[..] else {
        let message = "several adapters are merged as a weighted sum: say what each counts, as in `--weights 1,1` for \
                       all of each or `--weights 0.5,0.5` for the mean";
        return Err(Error::Config { what: "--weights", message: message.into() });
    };
    let (checkpoint, device) = (args.model.checkpoint()?, Device::cpu());
    let (mut adapted, fresh) = with_adapters(&checkpoint, &by_name(&opened), &device)?;
    chosen.turn_on(&mut adapted, &fresh, &args.model.model)?;
    let mut model = adapted.into_model();
    let before = probe(&model)?;
    model.freeze();
    let first = model.linears().first().map(|(_, layer)| layer.weight().value().dtype());
    let dtype = args.dtype.map(Type::dtype).or(first).unwrap_or(DType::F32);
    let merged = merge(&mut model, Some(dtype))?;
    let after = probe(&model)?;
    if let Some(value) = after.iter().find(|x| !x.is_finite()) {
        return Err(wrong(
            &args.out,
            format!("the merged model's outputs are not finite ({value}): nothing is written"),
        ));
    }
    let difference = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);

    let about = About::read(&chosen.folder)?;
    let head = match &about {
        Some(about) => Head {
            labels: about.task.labels().map_or(vec![], |labels| labels.names().to_vec()),
            problem: Some(about.task.problem().into()),
        },
        None => Head { labels: checkpoint.labels()?, problem: checkpoint.problem()?.map(String::from) },
    };
    model.cast(dtype)?;
    model.save(&checkpoint, &head, &args.out)?;
    if let Some(about) = about {
        about.write(&args.out)?;
    }

    let total =
        |f: fn(&randlora::nn::Merged) -> f64| merged.iter().map(|(_, m)| f(m).powi(2)).sum::<f64>().sqrt();
    let lost = share(total(|m| m.lost()), total(|m| m.size()));
    let shares = merged.iter().map(|(name, m)| (name.as_str(), share(m.lost(), m.size())));
    let (worst, most) = shares.fold(("", 0.0), |most, one| if one.1 >= most.1 { one } else { most });
    if args.json {
        return say(json!({
            "layers": merged.len(), "dtype": dtype.to_string(), "lost": lost, "difference": difference,
            "worst": { "layer": worst, "lost": most },
        }));
    }
    say(format_args!(
        "{} layers merged in {dtype}; outputs differ by at most {difference:.1e}",
        merged.len()
    ))?;
    if lost > 0.0 {
        say(format_args!(
            "rounding to {dtype} lost {:.2} % of ΔW, at most {:.2} % ({worst}); `--dtype f32` keeps all of it",
            100.0 * lost,
            100.0 * most
        ))?;
    }
    eprintln!("written: {}", args.out.display());
    Ok(())
}

fn share(lost: f64, size: f64) -> f64 {
    if size > 0.0 { lost / size } else { 0.0 }
}

/// The outputs for some texts: the classifier's, or without one the hidden states.
fn probe(model: &Bert) -> Result<Vec<f32>> {
    let (vocab, length) = (model.config().vocab as u32, model.config().positions.min(16));
    let text = |row: u32| {
        let ids = (0..length as u32).map(|place| (row * 7919 + place * 104_729 + 1) % vocab).collect();
        TokenIds { ids, ..TokenIds::default() }
    };
    let texts: Vec<TokenIds> = (0..8).map(text).collect();
    let batch = TokenBatch::pad(&texts.iter().collect::<Vec<_>>(), model.config().pad)?;
    let outputs = match model.config().labels {
        0 => model.hidden(&batch, &Context::eval())?,
        _ => model.forward(&batch, &Context::eval())?,
    };
    outputs.to_dtype(DType::F32)?.to_vec()
}
