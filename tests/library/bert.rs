//! BERT against transformers: outputs, losses and gradients of odd configurations (made by
//! tests/oracle/bert.py), and of all-MiniLM-L6-v2.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{
    Folder, OUTPUTS, batch, close, distance, expected, largest, load, oracle, says, tensors, values,
};
use randlora::adapters::{Full, Targets, attach};
use randlora::io::{Access, Checkpoint, SafeTensors};
use randlora::models::{Bert, BertConfig, BertLoad};
use randlora::nn::{Context, Module};
use randlora::{DType, Device, Error, Tensor};

const CASES: [&str; 5] = ["single_label", "regression", "multi_label_sharded", "bf16", "plain_f16"];

/// How far a gradient may be from torch's, in units of the parameter's largest: what backward adds to
/// the rounding of the outputs.
const GRADIENTS: [(DType, f64); 2] = [(DType::F32, 1e-4), (DType::F64, 1e-12)];

/// A parameter's largest gradient counts as at least this share of the model's largest: that of a key's
/// bias is 0 but for rounding, which is as large as the terms that cancel.
const FLOOR: f64 = 1e-2;

/// How far values of all-MiniLM-L6-v2 may be from the reference, which was computed in f32 too: they are
/// of size 1 after six blocks.
const MINILM: f64 = 2e-5;

fn folder(case: &str) -> PathBuf {
    oracle("bert").join(case)
}

/// A case's model with all of it trained, which widens what is stored narrow.
fn trained(case: &str, dtype: DType) -> Bert {
    let mut model = load(&folder(case), Access::Map);
    attach(&mut model, &Full, &Targets::AllLinear, &[]).unwrap();
    model.cast(dtype).unwrap();
    model
}

/// The outputs by the names that the file has for them.
fn outputs(model: &Bert, file: &SafeTensors, ctx: &Context) -> Vec<(&'static str, Tensor)> {
    let batch = batch(file, None);
    match model.config().labels {
        0 => vec![
            ("last_hidden_state", model.hidden(&batch, ctx).unwrap()),
            ("pooler_output", model.pooled(&batch, ctx).unwrap()),
        ],
        _ => vec![("logits", model.forward(&batch, ctx).unwrap())],
    }
}

/// What the file's loss is of: the labels' kind says which.
fn loss(case: &str, outputs: &[(&str, Tensor)], file: &SafeTensors) -> Tensor {
    let like = |name: &str, x: &Tensor| {
        let weights = file.tensor(name, &Device::cpu()).unwrap().to_dtype(x.dtype()).unwrap();
        weights.reshape(x.shape()).unwrap()
    };
    match outputs {
        [(_, logits)] => match case {
            "regression" => logits.mse_loss(&like("labels", logits)),
            "multi_label_sharded" => logits.binary_cross_entropy(&like("labels", logits)),
            _ => {
                let labels: Vec<u32> =
                    file.integers("labels").unwrap().0.into_iter().map(|label| label as u32).collect();
                logits.cross_entropy(&labels, None, 0.0)
            }
        },
        _ => {
            let sums = outputs.iter().map(|(name, x)| x.mul(&like(&format!("w.{name}"), x))?.sum_all());
            sums.reduce(|a, b| a?.add(&b?)).unwrap()
        }
    }
    .unwrap()
}

/// The values at unmasked places; all of an output that has none.
fn shown(name: &str, all: Vec<f64>, file: &SafeTensors) -> Vec<f64> {
    let (mask, _) = file.integers("attention_mask").unwrap();
    let width = all.len() / mask.len().max(1);
    match name {
        "last_hidden_state" => {
            all.chunks(width).zip(mask).filter(|(_, m)| *m != 0).flat_map(|(x, _)| x.to_vec()).collect()
        }
        _ => all,
    }
}

#[test]
fn outputs_and_loss_are_those_of_transformers() {
    for case in CASES {
        let file = tensors(&folder(case).join("expected.safetensors"));
        for (dtype, tolerance) in OUTPUTS {
            let outputs = outputs(&trained(case, dtype), &file, &Context::eval());
            for (name, x) in &outputs {
                assert_eq!(x.dtype(), dtype);
                let [got, want] = [values(x), expected(&file, name)].map(|all| shown(name, all, &file));
                close(&format!("{case} {dtype} {name}"), &got, &want, tolerance);
            }
            let got = values(&loss(case, &outputs, &file));
            close(&format!("{case} {dtype} loss"), &got, &expected(&file, "loss"), tolerance);
        }
    }
}

#[test]
fn gradients_are_those_of_torch() {
    for case in CASES {
        let file = tensors(&folder(case).join("expected.safetensors"));
        let names: Vec<&str> = file.entries().filter_map(|(name, _)| name.strip_prefix("grad.")).collect();
        let most = names.iter().map(|name| largest(&expected(&file, &format!("grad.{name}"))));
        let floor = FLOOR * most.fold(0.0, f64::max);
        for (dtype, tolerance) in GRADIENTS {
            let model = trained(case, dtype);
            let outputs = outputs(&model, &file, &Context::eval().tracked());
            let gradients = loss(case, &outputs, &file).backward().unwrap();
            let mut parameters: Vec<_> = model.parameters();
            parameters.sort_by(|(a, _), (b, _)| a.cmp(b));
            assert_eq!(parameters.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), names, "{case}");
            let mut worst = (0.0, "");
            for (name, parameter) in &parameters {
                let got = values(gradients.get(parameter.leaf()).unwrap());
                let want = expected(&file, &format!("grad.{name}"));
                let apart = distance(&got, &want) / largest(&want).max(floor);
                worst = if apart > worst.0 { (apart, name) } else { worst };
            }
            println!("{case} {dtype} gradients: {:.1e}, {}", worst.0, worst.1);
            assert!(worst.0 <= tolerance, "{case} {dtype}: {worst:?}");
        }
    }
}

#[test]
fn narrow_matrices_stay_narrow_until_they_are_trained() {
    for (case, narrow) in [("bf16", DType::BF16), ("plain_f16", DType::F16)] {
        let mut model = load(&folder(case), Access::Map);
        for (name, parameter) in model.parameters() {
            let dtype = if parameter.value().rank() >= 2 { narrow } else { DType::F32 };
            assert_eq!(parameter.value().dtype(), dtype, "{case} {name}");
        }
        let file = tensors(&folder(case).join("expected.safetensors"));
        // Frozen, they are widened on the way: the same as widened before.
        model.freeze();
        let wide = outputs(&trained(case, DType::F32), &file, &Context::eval());
        for ((name, a), (_, b)) in outputs(&model, &file, &Context::eval()).iter().zip(&wide) {
            close(&format!("{case} {name} stored as {narrow}"), &values(a), &values(b), OUTPUTS[0].1);
        }
    }
}

#[test]
fn a_mapped_file_gives_the_bits_of_one_that_is_read() {
    for case in CASES {
        let file = tensors(&folder(case).join("expected.safetensors"));
        let [mapped, read] = [Access::Map, Access::Read].map(|access| {
            let mut model = load(&folder(case), access);
            model.freeze();
            let outputs = outputs(&model, &file, &Context::eval());
            outputs.iter().flat_map(|(_, x)| x.to_vec::<f32>().unwrap()).map(f32::to_bits).collect::<Vec<_>>()
        });
        assert_eq!(mapped, read, "{case}");
    }
}

#[test]
fn parts_that_the_checkpoint_lacks_are_new_and_named() {
    let open = |case: &str| Checkpoint::open(&folder(case), Access::Map).unwrap();
    let load =
        |case: &str, labels| Bert::load(&open(case), BertLoad { labels, seed: 3 }, &Device::cpu()).unwrap();
    let new = ["classifier.weight", "classifier.bias"];
    for (case, labels, fresh, unused) in [
        ("plain_f16", None, &new[..0], 0),
        ("plain_f16", Some(3), &new[..], 0),
        ("single_label", None, &[], 0),
        ("single_label", Some(3), &new, 2),
        ("single_label", Some(2), &new, 2),
    ] {
        let (model, loaded) = load(case, labels);
        assert_eq!(
            (loaded.fresh.iter().map(String::as_str).collect::<Vec<_>>(), loaded.unused.len()),
            (fresh.to_vec(), unused),
            "{case}"
        );
        let (again, _) = load(case, labels);
        let classifier = |model: &Bert| model.state().get("classifier.weight").map(values);
        assert_eq!(classifier(&model), classifier(&again));
        assert_eq!(classifier(&model).is_some(), labels.is_some() || case == "single_label", "{case}");
        if labels.is_some() {
            assert!(classifier(&model).is_some_and(|w| w.iter().any(|&w| w != 0.0)));
        }
    }
}

/// A copy of a model folder.
fn copy(name: &str, case: &str) -> Folder {
    let files = fs::read_dir(folder(case)).unwrap().map(|entry| entry.unwrap().path());
    Folder::with(name, &files.collect::<Vec<_>>())
}

fn refused(folder: &Path, parts: &[&str]) {
    let result = Checkpoint::open(folder, Access::Map)
        .and_then(|checkpoint| Bert::load(&checkpoint, BertLoad::default(), &Device::cpu()));
    let error = result.expect_err("it is no model of this crate");
    assert!(matches!(error, Error::Data { .. }), "{error:?}");
    says(&error, parts);
}

#[test]
fn a_configuration_of_something_else_is_refused() {
    for (i, (from, to, part)) in [
        ("\"model_type\": \"bert\"", "\"model_type\": \"roberta\"", "family is roberta: only bert"),
        ("\"hidden_act\": \"gelu\"", "\"hidden_act\": \"mish\"", "`hidden_act` is mish"),
        ("\"hidden_act\": \"gelu\"", "\"hidden_act\": 3", "`hidden_act` is 3, not a text"),
        ("\"hidden_size\": 36", "\"hidden_size\": null", "`hidden_size` is missing"),
        ("\"hidden_size\": 36", "\"hidden_size\": -1", "`hidden_size` is -1, not a number"),
        ("\"hidden_size\": 36", "\"hidden_size\": 0", "width"),
        ("\"vocab_size\": 31", "\"vocab_size\": 9223372036854775807", "more elements than memory"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000000", "there are 41 tensors"),
        ("\"num_attention_heads\": 3", "\"num_attention_heads\": 5", "heads"),
        ("\"pad_token_id\": 0", "\"pad_token_id\": 31", "pad"),
        ("\"is_decoder\": false", "\"is_decoder\": true", "`is_decoder` is true"),
        ("\"is_decoder\": false", "\"position_embedding_type\": \"relative_key\"", "relative_key"),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = copy(&format!("config-{i}"), "single_label");
        folder.edit("config.json", from, to);
        refused(&folder.0, &["config.json: ", part]);
    }
}

#[test]
fn tensors_that_are_missing_or_of_another_shape_are_named() {
    let needed = "bert.encoder.layer.1.output.dense.bias";
    let folder = copy("missing", "single_label");
    let source = self::folder("single_label").join("model.safetensors");
    folder.rename(&source, "model.safetensors", |name| (name != needed).then(|| name.into()));
    refused(&folder.0, &[&folder.0.display().to_string(), &format!("there is no tensor `{needed}`")]);

    let folder = copy("shape", "single_label");
    folder.edit("config.json", "\"intermediate_size\": 50", "\"intermediate_size\": 51");
    let parts =
        ["`bert.encoder.layer.0.intermediate.dense.weight` is [50, 36] where config.json makes it [51, 36]"];
    refused(&folder.0, &[&folder.0.display().to_string(), parts[0]]);

    let folder = copy("shard", "multi_label_sharded");
    fs::remove_file(folder.0.join("model-00002-of-00004.safetensors")).unwrap();
    let error = Checkpoint::open(&folder.0, Access::Map).unwrap_err();
    says(&error, &["model-00002-of-00004.safetensors"]);
}

/// The files of all-MiniLM-L6-v2: what the reference was made from, and the folder with the weights.
fn minilm() -> Option<(PathBuf, PathBuf)> {
    let assets = env::var("RANDLORA_ASSETS")
        .map_or_else(|_| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets"), PathBuf::from);
    let reference = assets.join("models/all-MiniLM-L6-v2/reference.safetensors");
    let weights = PathBuf::from(env::var_os("RANDLORA_MINILM")?);
    (reference.is_file() && weights.join("model.safetensors").is_file()).then_some((reference, weights))
}

#[test]
fn all_minilm_l6_v2_gives_its_reference() {
    let Some((reference, weights)) = minilm() else {
        let message = "all-MiniLM-L6-v2 is not there: set RANDLORA_ASSETS to the assets and RANDLORA_MINILM to \
                       the folder with model.safetensors";
        assert!(env::var_os("CI").is_none(), "{message}");
        eprintln!("skipped: {message}");
        return;
    };
    let checkpoint = Checkpoint::open(&weights, Access::Map).unwrap();
    let (model, loaded) = Bert::load(&checkpoint, BertLoad::default(), &Device::cpu()).unwrap();
    assert_eq!((loaded.fresh, model.config()), (vec![], &BertConfig::of(&checkpoint).unwrap()));
    assert_eq!(loaded.unused, ["embeddings.position_ids"]);

    let file = tensors(&reference);
    let hidden = model.hidden(&batch(&file, None), &Context::eval()).unwrap();
    let &[rows, places, width] = hidden.dims() else { panic!("{hidden:?}") };
    let hidden = values(&hidden);
    let [got, want] =
        [hidden.clone(), expected(&file, "last_hidden_state")].map(|x| shown("last_hidden_state", x, &file));
    let apart = distance(&got, &want);
    println!("MiniLM hidden: {apart:.1e}");
    assert!(apart <= MINILM, "{apart:e}");

    let (mask, _) = file.integers("attention_mask").unwrap();
    let sentences: Vec<f64> =
        (0..rows).flat_map(|row| sentence(&hidden, &mask, row, [places, width])).collect();
    let apart = distance(&sentences, &expected(&file, "sentence_embedding"));
    println!("MiniLM sentences: {apart:.1e}");
    assert!(apart <= MINILM, "{apart:e}");
}

/// The mean of a row's unmasked tokens, made a unit vector.
fn sentence(hidden: &[f64], mask: &[i64], row: usize, [places, width]: [usize; 2]) -> Vec<f64> {
    let mut sum = vec![0.0; width];
    for place in (row * places..(row + 1) * places).filter(|&place| mask[place] != 0) {
        sum.iter_mut().zip(&hidden[place * width..]).for_each(|(sum, x)| *sum += x);
    }
    let norm = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
    sum.iter().map(|x| x / norm).collect()
}
