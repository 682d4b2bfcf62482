//! The methods of PEFT beside RandLoRA, in its files (made by tests/oracle/peft_methods.py): logits and gradients on
//! the same weights, saving them again, AdaLoRA's training with its budget, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{Folder, batch, close, distance, expected, largest, load, oracle, says, tensors, values};
use randlora::adapters::{AdaLora, Dora, PerLayer, Pissa, Targets, TorchVera, Vera, attach};
use randlora::io::{Access, Adapter, PeftAdapter, PeftTask, SafeTensors, save_adapter, save_peft};
use randlora::models::Bert;
use randlora::nn::{Context, ItemMut, Module};
use randlora::optim::{AdamW, Optimizer};
use randlora::{DType, Device, Tensor};
use serde_json::{Value, json};

/// Square, wide and tall.
const LAYERS: [&str; 3] =
    ["layer.0.attention.self.query", "layer.1.intermediate.dense", "layer.1.output.dense"];

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// How far logits and gradients may be from PEFT's, relative to the largest. It computed in f64 but for PiSSA's start,
/// which is of f32; gradients of adapters in 16 bits are stored in f32.
fn tolerances(case: &str, dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F64 if case.starts_with("pissa") && case != "pissa-converted" => (1e-5, 1e-4),
        DType::F64 if case.ends_with("f16") => (1e-12, 2e-7),
        DType::F64 => (1e-12, 1e-11),
        _ => (1e-5, 1e-4),
    }
}

fn folder(case: &str) -> PathBuf {
    oracle("peft_methods").join(case)
}

fn cases() -> Vec<String> {
    let entries = fs::read_dir(folder("")).unwrap().map(|entry| entry.unwrap().path());
    let folders = entries.filter(|path| path.is_dir() && !path.ends_with("adalora-training"));
    let mut names: Vec<String> =
        folders.map(|path| path.file_name().unwrap().to_str().unwrap().into()).collect();
    names.sort();
    assert_eq!(names.len(), 23);
    names
}

fn inputs() -> SafeTensors {
    tensors(&oracle("peft_adapters/inputs.safetensors"))
}

fn base(dtype: DType) -> Bert {
    let mut model = load(&oracle("peft_adapters/model"), Access::Map);
    model.cast(dtype).unwrap();
    model
}

/// The model with the adapter of a folder.
fn adapted(folder: &Path, dtype: DType) -> Bert {
    let mut model = base(dtype);
    PeftAdapter::open(folder).unwrap().attach(&mut model).unwrap();
    model
}

fn logits(model: &Bert) -> Vec<f64> {
    values(&model.forward(&batch(&inputs(), None), &Context::eval()).unwrap())
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The tensors of a file by name.
fn contents(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<f64>)> {
    let file = tensors(path);
    let one = |name: &str| {
        let entry = file.entry(name).unwrap();
        (entry.dtype.to_string(), entry.dims.clone(), expected(&file, name))
    };
    // With `bias: all` PEFT writes the classifier's bias before training once more.
    let kept = file.entries().filter(|(name, _)| !name.contains(".original_module."));
    kept.map(|(name, _)| (name.to_string(), one(name))).collect()
}

/// PEFT's name of a trained parameter.
fn stored(name: &str) -> String {
    let (layer, part) = name.rsplit_once('.').unwrap();
    let (module, method) = layer.rsplit_once('.').unwrap_or(("", layer));
    let part = match (method, part) {
        ("vera", part) => format!("vera_{part}"),
        ("adalora", part) => format!("lora_{}", part.to_uppercase()),
        ("dora", "magnitude") => "lora_magnitude_vector".into(),
        ("lora" | "dora" | "pissa", part) => format!("lora_{}.weight", part.to_uppercase()),
        _ if part == "bias" && LAYERS.iter().any(|adapted| layer.ends_with(adapted)) => {
            return format!("base_model.model.{layer}.base_layer.bias");
        }
        _ => return format!("base_model.model.{name}"),
    };
    format!("base_model.model.{module}.{part}")
}

#[test]
fn logits_and_gradients_are_pefts() {
    let plain = logits(&base(DType::F64));
    for case in cases() {
        let want = tensors(&folder(&case).join("expected.safetensors"));
        assert!(distance(&plain, &expected(&want, "logits")) > 1e-2, "{case} changes nothing");
        for dtype in [DType::F64, DType::F32] {
            let (for_logits, for_gradients) = tolerances(&case, dtype);
            let model = adapted(&folder(&case), dtype);
            let logits = model.forward(&batch(&inputs(), None), &Context::eval().tracked()).unwrap();
            let got = values(&logits.detach());
            close(&format!("{case} {dtype}"), &got, &expected(&want, "logits"), for_logits);
            let weights = (0..logits.numel()).map(|i| (i as f64).cos()).collect();
            let weights = Tensor::from_vec::<f64>(weights, logits.shape(), &Device::cpu()).unwrap();
            let gradients = logits.backward_from(&weights.to_dtype(dtype).unwrap()).unwrap();
            let mut checked = 0;
            for (name, parameter) in model.parameters() {
                if parameter.is_trainable() {
                    let got = values(gradients.get(parameter.leaf()).unwrap());
                    let want = expected(&want, &format!("grad.{}", stored(&name)));
                    // A key's bias changes nothing: its gradient is rounding.
                    let apart = distance(&got, &want) / largest(&want).max(1e-2);
                    println!("{case} {dtype} {name}: {apart:.1e}");
                    assert!(apart <= for_gradients, "{case} {dtype} {name}: {apart:e}");
                    checked += 1;
                }
            }
            assert_eq!(checked + 1, want.entries().count(), "{case}");
        }
    }
}

#[test]
fn a_saved_adapter_is_the_file_that_peft_would_write() {
    for case in cases() {
        let (model, saved) =
            (adapted(&folder(&case), DType::F32), Folder::with(&format!("methods-{case}"), &[]));
        save_peft(&model, &saved.0, &PeftTask::default()).unwrap();
        assert_eq!(logits(&adapted(&saved.0, DType::F32)), logits(&model), "{case}");
        let (mut got, mut want) = (contents(&saved.0.join(TENSORS)), contents(&folder(&case).join(TENSORS)));
        if case == "vera-drawn" {
            // Here the matrices go along.
            let drawn: Vec<_> =
                ["A", "B"].map(|x| got.remove(&format!("base_model.vera_{x}")).unwrap()).into();
            let sizes: Vec<_> = drawn.iter().map(|(_, dims, _)| dims.clone()).collect();
            assert_eq!(sizes, [[7, 20], [20, 7]]);
        }
        // They were computed with in f32.
        want.values_mut().for_each(|(dtype, _, _)| *dtype = "F32".into());
        assert!(got == want, "{case}: {:?} and {:?}", got.keys(), want.keys());

        let (ours, theirs) = (json(&saved.0.join(CONFIG)), json(&folder(&case).join(CONFIG)));
        for (field, value) in ours.as_object().unwrap() {
            // What is no longer known, or said in other words: the plain alpha, the layers' own settings.
            let other: &[&str] = match case.as_str() {
                "vera-drawn" => &["save_projection", "projection_prng_key"],
                _ if case.contains("rslora") => &["lora_alpha", "use_rslora"],
                _ if case.contains("patterns") => &["lora_alpha", "alpha_pattern", "rank_pattern"],
                _ => &[],
            };
            let unknown = ["base_model_name_or_path", "task_type", "target_modules", "modules_to_save"];
            let other = [other, &unknown].concat().contains(&field.as_str());
            assert!(other || *value == theirs[field], "{case} {field}: {value} and {}", theirs[field]);
        }
    }
}

#[test]
fn an_adapter_that_was_only_loaded_is_saved_bit_for_bit() {
    for case in cases() {
        let opened = PeftAdapter::open(&folder(&case)).unwrap();
        let mut model = base(DType::F32);
        opened.attach(&mut model).unwrap();
        let saved = Folder::with(&format!("methods-like-{case}"), &[]);
        opened.save(&model, &saved.0).unwrap();
        let (got, want) = (contents(&saved.0.join(TENSORS)), contents(&folder(&case).join(TENSORS)));
        assert!(got == want, "{case}: {:?} and {:?}", got.keys(), want.keys());
        assert_eq!(json(&saved.0.join(CONFIG)), json(&folder(&case).join(CONFIG)), "{case}");
    }
}

/// What was made here, and goes through a file of PEFT's form.
#[test]
fn ours_comes_back_bit_for_bit() {
    let dora = |rank: usize| Box::new(Dora { rank, scale: 2.0 / 3.0, dropout: 0.1, ..Dora::default() });
    let patterns = PerLayer::new(dora(5)).with(Targets::names(&["query"]), dora(3));
    let pissa = Pissa { rank: 5, scale: 1.0 / 3.0, dropout: 0.0 };
    let vera = Vera { rank: 7, d_initial: 0.2, seed: 9, ..Vera::default() };
    let ada = AdaLora { rank: 2, first_rank: 5, scale: 0.7, ..AdaLora::over(50) };
    let methods: [(&str, &dyn randlora::adapters::Method); 4] =
        [("dora", &patterns), ("pissa", &pissa), ("vera", &vera), ("adalora", &ada)];
    for (name, method) in methods {
        let mut model = base(DType::F32);
        attach(&mut model, method, &Targets::names(&LAYERS), &["classifier"]).unwrap();
        let noise = &mut |name: &str, item: ItemMut<'_>| match item {
            ItemMut::Parameter(parameter) if parameter.is_trainable() => {
                let init = randlora::nn::Init::seeded(4, &Device::cpu());
                parameter.set(parameter.value().add(&init.normal(
                    name,
                    *parameter.value().shape(),
                    0.2,
                )?)?)
            }
            _ => Ok(()),
        };
        model.try_visit_mut(noise).unwrap();
        let saved = Folder::with(&format!("methods-ours-{name}"), &[]);
        save_adapter(&model, &saved.0, &PeftTask::default()).unwrap();
        let Adapter::Peft(opened) = Adapter::open(&saved.0).unwrap() else { panic!("{name} is not PEFT's") };
        assert_eq!(opened.config().method(), name);
        let mut again = base(DType::F32);
        opened.attach(&mut again).unwrap();
        for ((name, a), (_, b)) in model.parameters().into_iter().zip(again.parameters()) {
            assert_eq!(a.value().dims(), b.value().dims(), "{name}");
            assert_eq!(values(a.value()), values(b.value()), "{name}");
            assert_eq!(a.is_trainable(), b.is_trainable(), "{name}");
        }
        // With dropout, so that its rate is the same too.
        for ctx in [Context::eval(), Context::train(1, 2)] {
            let run = |model: &Bert| values(&model.forward(&batch(&inputs(), None), &ctx).unwrap());
            assert_eq!(run(&again), run(&model), "{name}");
        }
    }
}

/// A gradient through DoRA's lengths is nothing that PEFT has.
#[test]
fn what_peft_cannot_say_stays_in_our_own_form() {
    let mut model = base(DType::F32);
    let method = Dora { rank: 2, through_norm: true, ..Dora::default() };
    attach(&mut model, &method, &Targets::names(&LAYERS), &[]).unwrap();
    let saved = Folder::with("methods-through", &[]);
    says(&save_peft(&model, &saved.0, &PeftTask::default()).unwrap_err(), &["no form in PEFT"]);
    save_adapter(&model, &saved.0, &PeftTask::default()).unwrap();
    assert!(matches!(Adapter::open(&saved.0).unwrap(), Adapter::Own(_)));
}

/// What PiSSA started from is what PEFT took out of the weight: both are the principal part of it.
#[test]
fn pissa_starts_where_pefts_does() {
    let mut model = base(DType::F64);
    let plain = logits(&model);
    close("no adapter", &plain, &expected(&inputs(), "logits"), 1e-12);
    let method = Pissa { rank: 5, scale: 7.0 / 5.0, dropout: 0.0 };
    attach(&mut model, &method, &Targets::names(&LAYERS), &[]).unwrap();
    close("PiSSA at its start", &logits(&model), &plain, 1e-14);
}

/// PEFT's own conversion, which the start is in too, against what is computed from the start that is found here.
#[test]
fn pissa_is_what_peft_converts_it_to() {
    let [found, converted] =
        ["pissa", "pissa-converted"].map(|case| logits(&adapted(&folder(case), DType::F64)));
    close("converted", &found, &converted, 1e-5);
}

#[test]
fn veras_matrices_are_pefts_to_the_bit() {
    let cases = json(&folder("vera_draws.json"));
    for case in cases.as_array().unwrap() {
        let size = |name: &str| case[name].as_u64().unwrap() as usize;
        let key = case["key"].as_str().unwrap().parse::<i64>().unwrap() as u64;
        let spec = TorchVera { key, rank: size("rank"), inputs: size("inputs"), outputs: size("outputs") };
        let matrices = spec.generate(&Device::cpu()).unwrap().map(|x| x.to_vec::<f32>().unwrap());
        let ends: Vec<f32> = matrices.iter().flat_map(|x| [x[0], x[x.len() - 1]]).collect();
        let theirs: Vec<f32> =
            case["ends"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        assert_eq!(ends, theirs, "{spec:?}");
        let sum = |x: &Vec<f32>| {
            let terms = (1i64..).zip(x).map(|(place, x)| (x.to_bits() as i32 as i64).wrapping_mul(place));
            terms.fold(0i64, i64::wrapping_add).to_string()
        };
        assert_eq!(json!([sum(&matrices[0]), sum(&matrices[1])]), case["sums"], "{spec:?}");
    }
}

#[test]
fn adalora_takes_away_what_peft_takes_away() {
    let case = "adalora-training";
    let want = tensors(&folder(case).join("expected.safetensors"));
    let opened = PeftAdapter::open(&folder(case)).unwrap();
    let mut model = base(DType::F64);
    opened.attach(&mut model).unwrap();
    let mut optimizer = AdamW::new().weight_decay(0.0);
    let (tokens, ctx) = (batch(&inputs(), None), Context::eval().tracked());
    let mut losses = vec![];
    let mut step_of = |model: &mut Bert, step: usize| {
        let loss = model.forward(&tokens, &ctx).unwrap().cross_entropy(&[0, 2, 1, 1, 0], None, 0.0).unwrap();
        let loss = loss.add(&model.regulariser(&ctx).unwrap().unwrap()).unwrap();
        let gradients = loss.backward().unwrap();
        optimizer.step(model, &gradients, 0.02).unwrap();
        model.after_step(step, &gradients).unwrap();
        loss.item().unwrap()
    };
    (0..14).for_each(|step| losses.push(step_of(&mut model, step)));
    close("losses", &losses, &expected(&want, "losses"), 1e-10);
    let mut ranks = vec![];
    for (name, parameter) in model.parameters() {
        if name.ends_with("adalora.e") {
            let got = values(parameter.value());
            close(&name, &got, &expected(&want, &stored(&name)), 1e-9);
            ranks.push(got.iter().filter(|&&e| e != 0.0).count());
        }
    }
    // Two for each layer, but not in each: what is left is where it matters.
    assert_eq!(ranks, [4, 1, 1]);

    // What is saved is what is left, and no more is taken away from it.
    let saved = Folder::with("methods-left", &[]);
    opened.save(&model, &saved.0).unwrap();
    let mut again = adapted(&saved.0, DType::F64);
    close("what is left", &logits(&again), &logits(&model), 1e-14);
    let shapes = |model: &Bert| -> Vec<Vec<usize>> {
        let all = model.parameters().into_iter().filter(|(name, _)| name.contains("adalora"));
        all.map(|(_, parameter)| parameter.value().dims().to_vec()).collect()
    };
    assert_eq!(shapes(&again)[..3], [vec![4, 12], vec![12, 4], vec![4, 1]]);
    let pattern = &json(&saved.0.join(CONFIG))["rank_pattern"];
    assert_eq!(pattern.as_object().unwrap().len(), 3);
    let mut optimizer = AdamW::new().weight_decay(0.0);
    for step in 0..14 {
        let loss = again.forward(&tokens, &ctx).unwrap().cross_entropy(&[0, 2, 1, 1, 0], None, 0.0).unwrap();
        let gradients = loss.backward().unwrap();
        optimizer.step(&mut again, &gradients, 0.02).unwrap();
        again.after_step(step, &gradients).unwrap();
    }
    let left = again.parameters().into_iter().filter(|(name, _)| name.ends_with("adalora.e"));
    assert!(left.flat_map(|(_, parameter)| values(parameter.value())).all(|e| e != 0.0));
    let once_more = Folder::with("methods-left-again", &[]);
    save_peft(&again, &once_more.0, &PeftTask::default()).unwrap();
    assert_eq!(&json(&once_more.0.join(CONFIG))["rank_pattern"], pattern);
}

/// A layer of which nothing is left.
#[test]
fn a_rank_of_nothing() {
    let case = Folder::with("methods-nothing", &[folder("adalora").join(CONFIG)]);
    let file = tensors(&folder("adalora").join(TENSORS));
    let tall = "base_model.model.bert.encoder.layer.1.output.dense.lora_";
    let cut: Vec<(String, Tensor)> = file
        .entries()
        .map(|(name, _)| {
            let value = file.tensor(name, &Device::cpu()).unwrap();
            let value = match name.strip_prefix(tall) {
                Some("B") => value.slice(1, 0..0).unwrap().contiguous().unwrap(),
                Some(_) => value.slice(0, 0..0).unwrap().contiguous().unwrap(),
                None => value,
            };
            (name.to_string(), value)
        })
        .collect();
    randlora::io::save_safetensors(&case.0.join(TENSORS), &cut, &[]).unwrap();
    case.edit(
        CONFIG,
        "\"rank_pattern\": null",
        "\"rank_pattern\": {\"bert.encoder.layer.1.output.dense.lora_E\": [false, false, false, false, false]}",
    );
    let model = adapted(&case.0, DType::F32);
    let (without, with) = (logits(&model), logits(&adapted(&folder("adalora"), DType::F32)));
    assert!(distance(&without, &with) > 1e-3 * largest(&with));
    let saved = Folder::with("methods-nothing-saved", &[]);
    save_peft(&model, &saved.0, &PeftTask::default()).unwrap();
    assert_eq!(logits(&adapted(&saved.0, DType::F32)), without);
}

/// Fails unless the adapter of a case with this edited is refused by an error with these parts.
fn refused(case: &str, from: &str, to: &str, parts: &[&str]) {
    let edited = Folder::with("methods-refused", &[folder(case).join(CONFIG), folder(case).join(TENSORS)]);
    edited.edit(CONFIG, from, to);
    let mut model = base(DType::F32);
    let error = PeftAdapter::open(&edited.0).and_then(|adapter| adapter.attach(&mut model)).unwrap_err();
    says(&error, parts);
    says(&error, &[&edited.0.display().to_string()]);
    assert!(model.linears().iter().all(|(_, layer)| layer.adapter().is_none()));
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let pissa = "\"init_lora_weights\": \"pissa\"";
    let convert = "path_initial_model_for_weight_conversion";
    for (start, part) in [("pissa_niter_16", "draws anew"), ("olora", "changes the model's own weights")] {
        refused("pissa", pissa, &format!("\"init_lora_weights\": \"{start}\""), &[start, part, convert]);
    }
    refused("pissa", "\"use_dora\": false", "\"use_dora\": true", &["pissa", "together with `use_dora`"]);
    refused("pissa", "\"lora_alpha\": 7", "\"lora_alpha\": -7", &["scale", "above 0"]);
    refused("dora", "\"lora_bias\": false", "\"lora_bias\": true", &["`lora_bias` is true"]);
    refused("rslora", "\"use_dora\": false", "\"use_dora\": true", &["no tensor", "lora_magnitude_vector"]);
    refused("vera", "\"r\": 7", "\"r\": 8", &["vera_lambda_d", "[7]", "`r` is 8"]);
    refused("vera", "\"bias\": \"none\"", "\"bias\": \"lora_only\"", &["lora_only", "vera_only"]);
    refused("vera-drawn", "\"save_projection\": false", "\"save_projection\": true", &["vera_A", "missing"]);
    let key = "\"projection_prng_key\": 13";
    refused("vera-drawn", key, "\"projection_prng_key\": 1.5", &["projection_prng_key", "1.5"]);
    refused("adalora", "\"lora_alpha\": 3", "\"lora_alpha\": 0", &["`lora_alpha` is not above 0"]);
    refused("adalora", "\"total_step\": 14", "\"total_step\": null", &["`total_step` is missing"]);
    refused("adalora", "\"tinit\": 0", "\"tinit\": 14", &["14 to warm up"]);
    refused("adalora", "\"init_r\": 5", "\"init_r\": 6", &["lora_A", "`init_r` is 6"]);
    refused("adalora", "\"alpha_pattern\": {}", "\"alpha_pattern\": {\"query\": 2}", &["`alpha_pattern`"]);
    for (pattern, part) in [
        ("{\"query.lora_E\": [true]}", "no adapted layer"),
        ("{\"bert.encoder.layer.1.output.dense.lora_E\": [true, false]}", "no list of `init_r`, 5,"),
        ("[]", "not an object"),
    ] {
        refused("adalora", "\"rank_pattern\": null", &format!("\"rank_pattern\": {pattern}"), &[part]);
    }
}

#[test]
fn matrices_that_are_too_small_are_refused() {
    let case = Folder::with("methods-small", &[folder("vera").join(CONFIG)]);
    let file = tensors(&folder("vera").join(TENSORS));
    let cut: Vec<(String, Tensor)> = file
        .entries()
        .map(|(name, _)| {
            let value = file.tensor(name, &Device::cpu()).unwrap();
            let small = name == "base_model.vera_A";
            (name.into(), if small { value.slice(1, 0..19).unwrap().contiguous().unwrap() } else { value })
        })
        .collect();
    randlora::io::save_safetensors(&case.0.join(TENSORS), &cut, &[]).unwrap();
    let error = PeftAdapter::open(&case.0).unwrap().attach(&mut base(DType::F32)).unwrap_err();
    says(&error, &[TENSORS, "19", "20"]);
}
