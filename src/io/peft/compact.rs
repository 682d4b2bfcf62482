//! RandLoRA without its bases, in one file.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::adapters::{BasesOrigin, TorchBases, TorchDraw};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::files::io_error;
use crate::io::json::Object;
use crate::io::peft::kind::Kind;
use crate::io::peft::save::Saved;
use crate::io::peft::shared::Shared;
use crate::io::peft::{Biases, COMPACT, PeftConfig, origin};
use crate::io::safetensors::{SafeTensors, save_safetensors};
use crate::nn::Module;
use crate::ops::dropout::check_rate;
use crate::ops::randlora::{Bases, Structure};
use crate::tensor::Tensor;

const FORMAT: &str = "randlora compact 1";

/// Saves a model's RandLoRA adapters without their bases, and what else of it is trained, to
/// compact.safetensors in a folder, which is made if need be. [`PeftAdapter::open`](crate::io::PeftAdapter::open)
/// reads it back bit for bit.
///
/// # The form
///
/// One file of safetensors, with the names of PEFT's: for every adapted layer
/// `base_model.model.<layer>.randlora_lambda`, λ (r, n), and `….randlora_gamma`, γ (n, m), with m the smaller side of
/// its weight and n = ⌈m/r⌉; and `base_model.model.<parameter>` (of an adapted layer's bias
/// `base_model.model.<layer>.base_layer.bias`) for what else is trained; in F32, or F64 for a model
/// in f64. Its metadata has `format` =
/// `randlora compact 1` and `adapter`, a JSON object:
///
/// | field | value |
/// |---|---|
/// | `method` | `randlora` |
/// | `rank`, `scale`, `dropout` | r; s and the dropout as decimal numbers in texts |
/// | `targets`, `modules` | as PEFT's `target_modules` and `modules_to_save`: lists of names |
/// | `bias` | which biases are trained: `none`, `adapted` (the adapted layers') or `all` |
/// | `base_model` | the model, a path or name, or null |
/// | `bases` | what they follow from: see below |
///
/// A layer reads A\[:, :m\] and B\[:d, :n, :\], d its larger side. ΔW (out, in) is
/// s·Σᵢ Bᵢ diag(λ\[:, i\]) A diag(γ\[i, :\]) where in ≤ out, and the transpose of it where in > out. Under the pairing `paper`, column (i, k) of B meets row k of
/// A and λ\[k, i\]; under `peft`, with q = i·r + k, row and λ of rank ⌊q/n⌋ and λ and γ of basis q mod n.
///
/// # What bases follow from
///
/// | field | of | value |
/// |---|---|---|
/// | `from` | both | `randlora`: the format of this crate's adapters; `torch`: PEFT's draw |
/// | `rank`, `small`, `large` | both | r and the largest sides; A is (r, small), B (large, ⌈small/r⌉, r) |
/// | `seed` | both | a decimal number in a text |
/// | `structure` | randlora | `dense`, or `block`: B is (large, r), row d that of basis ⌊d/r⌋ mod n |
/// | `distribution` | randlora | `uniform`, `normal` or `ternary`; with `sparsity`, a decimal number in a text |
/// | `pairing` | randlora | `paper` or `peft` |
/// | `draw` | torch | `bf16` or `f16`: uniform, in that type; `sparse`, `very_sparse` |
///
/// Numbers whose every bit counts are texts: readers of JSON differ in how they round.
///
/// How the entries follow from the seed is written down in src/adapters/bases.rs ([`BasesSpec`](crate::adapters::BasesSpec))
/// and src/adapters/torch.rs ([`TorchBases`](crate::adapters::TorchBases)), with scripts in Python in tests/oracle.
///
/// # Errors
/// [`Error::Config`] for other adapters, and where the bases are not those of a seed, which is tried here;
/// [`Error::Io`] where the folder cannot be written.
pub fn save_compact<M: Module + ?Sized>(model: &M, folder: &Path, base_model: Option<&str>) -> Result<()> {
    let Saved { config, shared, sizes, tensors } = Saved::of(model)?;
    let Some(Shared::RandLora(bases, origin)) = shared else {
        let message = format!("the compact form leaves out RandLoRA's bases: {} has none", config.method());
        return Err(Error::config("adapter", message));
    };
    let about = json!({
        "method": config.method(),
        "rank": config.rank,
        "scale": config.scale.to_string(),
        "dropout": config.dropout.to_string(),
        "targets": config.targets,
        "modules": config.modules,
        "bias": match config.biases { Biases::None => "none", Biases::Adapted => "adapted", Biases::All => "all" },
        "base_model": base_model,
        "bases": origin::to_json(&confirmed(&bases, origin, &sizes)?)?,
    });
    fs::create_dir_all(folder).map_err(|source| io_error(folder, source))?;
    let metadata = [("format", FORMAT), ("adapter", &about.to_string())];
    save_safetensors(&folder.join(COMPACT), &tensors, &metadata)
}

/// What the bases follow from: made again, they are the same wherever a layer reads them.
fn confirmed(bases: &Bases, origin: Option<BasesOrigin>, sizes: &[[usize; 2]]) -> Result<BasesOrigin> {
    let other = |origin| match origin {
        // The type is the machine's affair, and the file does not say.
        BasesOrigin::Torch(spec @ TorchBases { draw: TorchDraw::Uniform(DType::BF16), .. }) => {
            Some(BasesOrigin::Torch(TorchBases { draw: TorchDraw::Uniform(DType::F16), ..spec }))
        }
        _ => None,
    };
    for origin in origin.into_iter().chain(origin.and_then(other)) {
        if same(bases, sizes, &origin)? {
            return Ok(origin);
        }
    }
    let message = "they follow from no seed that is known here, and the compact form has no room for them: keep the \
                   adapter in PEFT's form";
    Err(Error::config("bases", message))
}

fn same(bases: &Bases, sizes: &[[usize; 2]], origin: &BasesOrigin) -> Result<bool> {
    let rank = bases.rank();
    let side = |pick: fn(usize, usize) -> usize| sizes.iter().map(|&[a, b]| pick(a, b)).max().unwrap_or(0);
    let (small, large) = (side(usize::min), side(usize::max));
    let read = small.div_ceil(rank);
    // Room is made for what the layers need, not for what a file says.
    let (of_rank, sides) = match origin {
        BasesOrigin::Spec(spec) => (spec.rank, [spec.small, spec.large]),
        BasesOrigin::Torch(torch) => (torch.rank, [torch.small, torch.large]),
    };
    if of_rank != rank || sides.iter().any(|&side| side > large) {
        return Ok(false);
    }
    let mut again = origin.generate(bases.a().device())?;
    // Block bases may have been through PEFT's form, where they have their zeros.
    let mut bases = Bases::clone(bases);
    if again.structure() == Structure::Block && sizes.iter().all(|&[a, b]| a.min(b).div_ceil(rank) == read) {
        (again, bases) = (again.dense(read)?, bases.dense(read)?);
    }
    let kind = |bases: &Bases| (bases.rank(), bases.structure(), bases.pairing());
    let made = again.b_shape().dims();
    if kind(&again) != kind(&bases) || again.a().dims()[1] < small || made[0] < large {
        return Ok(false);
    }
    let dense = bases.structure() == Structure::Dense;
    if dense && made[1] < read {
        return Ok(false);
    }
    let read_of = |x: &Tensor, cuts: &[(usize, usize)]| {
        let cut = cuts.iter().try_fold(x.to_dtype(DType::F32)?, |x, &(dim, size)| x.slice(dim, 0..size))?;
        cut.to_vec::<f32>()
    };
    let (a, b) = ([(1, small)], [(0, large), (1, read)]);
    let b = if dense { &b[..] } else { &b[..1] };
    Ok(read_of(bases.a(), &a)? == read_of(again.a(), &a)?
        && read_of(&bases.b()?, b)? == read_of(&again.b()?, b)?)
}

/// What a file says of its adapter.
pub(super) fn read(file: &SafeTensors) -> Result<(PeftConfig, BasesOrigin)> {
    let metadata = |name: &str| file.metadata().get(name).map(String::as_str);
    if metadata("format") != Some(FORMAT) {
        let found = metadata("format").unwrap_or("unsaid");
        return Err(Error::data(file.what(), format!("the format is {found}, not `{FORMAT}`")));
    }
    let about = Object::parse(file.what().into(), metadata("adapter").unwrap_or("{}"))?;
    if about.text("method")? != Some("randlora") {
        return Err(about.error("`method` is not randlora, which alone has a compact form"));
    }
    let rank = about.needed("rank", about.size("rank")?)?;
    if rank == 0 {
        return Err(about.error("`rank` is 0: the rank is at least 1"));
    }
    let (scale, dropout): (f64, f64) = (origin::number(&about, "scale")?, origin::number(&about, "dropout")?);
    check_rate(dropout).map_err(|error| about.error(format!("`dropout`: {error}")))?;
    let names = |name| -> Result<Vec<String>> {
        Ok(about.texts(name)?.unwrap_or_default().into_iter().map(String::from).collect())
    };
    let biases = match about.text("bias")? {
        None | Some("none") => Biases::None,
        Some("adapted") => Biases::Adapted,
        Some("all") => Biases::All,
        Some(other) => return Err(about.error(format!("`bias` is {other}, not none, adapted or all"))),
    };
    let config = PeftConfig {
        base_model: about.text("base_model")?.map(String::from),
        targets: names("targets")?,
        modules: names("modules")?,
        biases,
        ..PeftConfig::new(Kind::RandLora(None), rank, scale, dropout)
    };
    let bases = about.needed("bases", about.object("bases")?)?;
    Ok((config, origin::from_json(&bases)?))
}
