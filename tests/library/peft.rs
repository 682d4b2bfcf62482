//! Adapters that PEFT saved (made by tests/oracle/peft_adapters.py and peft_training.py): their logits,
//! saving them again, training on from them, and those that are refused.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common;
use crate::common::{
    Folder, OUTPUTS, batch, close, distance, expected, largest, load, oracle, says, tensors, values,
};
use randlora::adapters::{Distribution, Lora, RandLora, RandLoraAdapter, Targets, attach};
use randlora::io::{Access, PeftAdapter, PeftTask, SafeTensors, save_peft};
use randlora::models::Bert;
use randlora::nn::{Context, Init, ItemMut, Module};
use randlora::optim::{AdamW, Decay, Optimizer, Schedule, clip_gradients};
use randlora::{DType, Device, Error, Pairing, Structure};
use serde_json::Value;

/// How far a loss of a training may be from PEFT's in f64, relative to it, over so many steps. What is
/// left is rounding, which grows with the steps; PEFT's own f32 is 3e-7 away.
const LOSSES: [(DType, usize, f64); 2] = [(DType::F64, 100, 1e-12), (DType::F32, 20, 1e-5)];

const TENSORS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

fn adapter(case: &str) -> PathBuf {
    oracle("peft_adapters").join(case)
}

/// The model of the adapters, or of the training.
fn base(of: &str, dtype: DType) -> Bert {
    let mut model = load(&oracle(of).join("model"), Access::Map);
    model.cast(dtype).unwrap();
    model
}

fn inputs() -> SafeTensors {
    tensors(&adapter("inputs.safetensors"))
}

fn logits(model: &Bert) -> Vec<f64> {
    values(&model.forward(&batch(&inputs(), None), &Context::eval()).unwrap())
}

/// The model with the adapter of a folder.
fn adapted(folder: &Path, dtype: DType) -> Bert {
    let mut model = base("peft_adapters", dtype);
    PeftAdapter::open(folder).unwrap().attach(&mut model).unwrap();
    model
}

/// The adapters that this crate reads.
fn cases() -> Vec<String> {
    let entries = fs::read_dir(adapter("")).unwrap().map(|entry| entry.unwrap().path());
    let names = entries.filter(|path| path.join("expected.safetensors").is_file());
    let mut names: Vec<String> =
        names.map(|path| path.file_name().unwrap().to_str().unwrap().into()).collect();
    names.sort();
    assert_eq!(names.len(), 28);
    names
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn logits_are_those_of_peft() {
    for (dtype, tolerance) in OUTPUTS {
        let plain = logits(&base("peft_adapters", dtype));
        close(&format!("no adapter {dtype}"), &plain, &expected(&inputs(), "logits"), tolerance);
        for case in cases() {
            let model = adapted(&adapter(&case), dtype);
            assert!(model.parameters().iter().all(|(_, p)| p.value().dtype() == dtype), "{case}");
            let want = expected(&tensors(&adapter(&case).join("expected.safetensors")), "logits");
            close(&format!("{case} {dtype}"), &logits(&model), &want, tolerance);
            assert!(distance(&plain, &want) > 1e-2 * largest(&want), "{case} changes nothing");
        }
    }
}

#[test]
fn what_is_trained_is_what_the_file_holds() {
    for case in cases() {
        let model = adapted(&adapter(&case), DType::F32);
        let file = tensors(&adapter(&case).join(TENSORS));
        let held = file.entries().filter(|(name, _)| !is_base(name) && !is_copy(name));
        let count: usize = held.map(|(_, entry)| entry.dims.iter().product::<usize>()).sum();
        assert_eq!(model.trainable_count(), count, "{case}");
    }
}

/// Whether a key is of one of RandLoRA's bases.
fn is_base(name: &str) -> bool {
    name.ends_with("randlora_A") || name.ends_with("randlora_B")
}

/// Whether a key is of something that PEFT writes twice: bases below a layer; with `bias: all` the classifier's
/// bias before training and once more after it.
fn is_copy(name: &str) -> bool {
    let base = is_base(name) && !name.starts_with("base_model.randlora_");
    base || name.contains(".original_module.") || name.contains(".modules_to_save.")
}

/// The tensors of a file by name, without the copies.
fn contents(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<f64>)> {
    let file = tensors(path);
    let one = |name: &str| {
        let entry = file.entry(name).unwrap();
        (entry.dtype.to_string(), entry.dims.clone(), expected(&file, name))
    };
    file.entries().filter(|(name, _)| !is_copy(name)).map(|(name, _)| (name.to_string(), one(name))).collect()
}

#[test]
fn a_saved_adapter_is_the_file_that_peft_would_write() {
    let task = PeftTask { name: Some("SEQ_CLS".into()), base_model: Some("model".into()) };
    for case in cases() {
        let model = adapted(&adapter(&case), DType::F32);
        let folder = Folder::with(&case, &[]);
        let saved = folder.0.join("new/adapter");
        save_peft(&model, &saved, &task).unwrap();
        let again = adapted(&saved, DType::F32);
        let bits = |model: &Bert| logits(model).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&again), bits(&model), "{case}");

        let (mut got, mut want) = (contents(&saved.join(TENSORS)), contents(&adapter(&case).join(TENSORS)));
        assert_eq!(tensors(&saved.join(TENSORS)).metadata()["format"], "pt");
        match case.as_str() {
            // The case without PEFT's pair at the model has that of randlora-shared.
            "randlora-per-layer" => want = contents(&adapter("randlora-shared").join(TENSORS)),
            // Here the bases go along.
            "randlora-seed-only" | "randlora-seed-sparse" => got.retain(|name, _| !is_base(name)),
            _ => {}
        }
        // They were computed with in f32.
        want.values_mut().for_each(|(dtype, _, _)| *dtype = "F32".into());
        assert!(got == want, "{case}: {:?} and {:?}", got.keys(), want.keys());
        check_config(&case, &json(&saved.join(CONFIG)), &json(&adapter(&case).join(CONFIG)), &model);
    }
}

/// PEFT's logits with such a file are in tests/oracle/our_adapters/block; see tests/cli/finetune.rs.
#[test]
fn block_bases_are_saved_with_their_zeros_and_read_without() {
    let targets = Targets::names(&["query", "intermediate.dense", "output.dense"]);
    for rank in [1, 5, 6] {
        let mut model = base("peft_adapters", DType::F32);
        let method = RandLora {
            rank,
            distribution: Distribution::Normal,
            structure: Structure::Block,
            pairing: Pairing::Peft,
            ..RandLora::default()
        };
        attach(&mut model, &method, &targets, &[]).unwrap();
        let init = Init::seeded(rank as u64, &Device::cpu());
        let randomise = &mut |name: &str, item: ItemMut<'_>| match item {
            ItemMut::Parameter(p) if name.contains("randlora") => {
                p.set(init.normal(name, p.value().dims(), 0.04)?)
            }
            _ => Ok(()),
        };
        model.try_visit_mut(randomise).unwrap();
        let folder = Folder::with(&format!("block-{rank}"), &[]);
        let [first, second] = ["first", "second"].map(|name| folder.0.join(name));
        save_peft(&model, &first, &PeftTask::default()).unwrap();
        let file = tensors(&first.join(TENSORS));
        assert_eq!(file.entry("base_model.randlora_B").unwrap().dims, [20, 20usize.div_ceil(rank), rank]);
        let zeros = expected(&file, "base_model.randlora_B").iter().filter(|&&b| b == 0.0).count();
        assert_eq!(zeros, 20 * (20usize.div_ceil(rank) - 1) * rank, "all but one basis in each row");

        for dtype in [DType::F32, DType::F64] {
            let again = adapted(&first, dtype);
            close(&format!("rank {rank} {dtype}"), &logits(&again), &logits(&model), OUTPUTS[0].1);
            for (_, layer) in again.linears().iter().filter(|(_, layer)| layer.adapter().is_some()) {
                let adapter: &dyn Any = layer.adapter().unwrap();
                let bases = adapter.downcast_ref::<RandLoraAdapter>().unwrap().bases();
                assert_eq!(bases.structure(), Structure::Block);
            }
        }
        let bits = |model: &Bert| logits(model).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        let again = adapted(&first, DType::F32);
        assert_eq!(bits(&again), bits(&model), "rank {rank}");
        let plain = logits(&base("peft_adapters", DType::F32));
        assert!(distance(&logits(&model), &plain) > 1e-2 * largest(&plain));
        save_peft(&again, &second, &PeftTask::default()).unwrap();
        assert!(fs::read(first.join(TENSORS)).unwrap() == fs::read(second.join(TENSORS)).unwrap());
    }
}

/// Fails unless our configuration says what PEFT's says of the things that matter.
fn check_config(case: &str, ours: &Value, theirs: &Value, model: &Bert) {
    let fields = match theirs["peft_type"].as_str() {
        Some("LORA") => vec!["lora_alpha", "lora_dropout", "use_dora", "use_rslora"],
        _ => vec!["randlora_alpha", "randlora_dropout", "projection_prng_key", "sparse", "very_sparse"],
    };
    for field in fields.into_iter().chain(["peft_type", "r", "bias", "fan_in_fan_out", "inference_mode"]) {
        // Written as the plain alpha, or as those of the layers, that mean the same.
        let other = ["lora-rslora", "lora-patterns", "lora-patterns-rslora"].contains(&case)
            && ["lora_alpha", "use_rslora", "r"].contains(&field);
        assert!(other || ours[field] == theirs[field], "{case} {field}: {} {}", ours[field], theirs[field]);
    }
    assert_eq!((&ours["task_type"], &ours["base_model_name_or_path"]), (&"SEQ_CLS".into(), &"model".into()));
    let whole = match case {
        "lora-no-classifier" | "lora-bias-only" => Value::Null,
        "lora-pooler-saved" => serde_json::json!(["bert.pooler.dense", "classifier"]),
        _ => serde_json::json!(["classifier"]),
    };
    assert_eq!(ours["modules_to_save"], whole, "{case}");
    let targets: Vec<&str> =
        ours["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let targets = Targets::names(&targets);
    for (name, layer) in model.linears() {
        let meant = targets.matches(&name) && name != "classifier";
        assert_eq!(meant, layer.adapter().is_some(), "{case} {name}: {targets:?}");
    }
}

#[test]
fn training_repeats_pefts_losses() {
    let folder = oracle("peft_training");
    let settings = json(&folder.join("settings.json"));
    let number = |name: &str| settings[name].as_f64().unwrap();
    let rows = tensors(&folder.join("rows.safetensors"));
    let (labels, _) = rows.integers("labels").unwrap();
    let (order, sizes) = rows.integers("batches").unwrap();
    let order: Vec<usize> = order.into_iter().map(|row| row as usize).collect();
    let batches: Vec<&[usize]> = order.chunks(sizes[1]).collect();
    let schedule = Schedule { warmup: number("warmup_steps") as usize, decay: Decay::Linear };

    for method in ["randlora", "lora"] {
        let peft = tensors(&folder.join(format!("{method}.safetensors")));
        let learning_rate = settings["lr"][method].as_f64().unwrap();
        let [losses, norms] = ["losses_f64", "norms_f64"].map(|name| expected(&peft, name));
        for (dtype, steps, tolerance) in LOSSES {
            let mut model = base("peft_training", dtype);
            PeftAdapter::open(&folder.join(method)).unwrap().attach(&mut model).unwrap();
            let mut optimizer = AdamW::new().weight_decay(number("weight_decay")).eps(number("eps"));
            let mut worst = [0.0f64; 2];
            for (step, &batch) in batches.iter().enumerate().take(steps) {
                let labels: Vec<u32> = batch.iter().map(|&row| labels[row] as u32).collect();
                let ctx = Context::train(0, step as u64);
                let logits = model.forward(&common::batch(&rows, Some(batch)), &ctx).unwrap();
                let loss = logits.cross_entropy(&labels, None, 0.0).unwrap();
                let mut gradients = loss.backward().unwrap();
                let norm = clip_gradients(&model, &mut gradients, number("clip_grad_norm"), step).unwrap();
                let rate = learning_rate * schedule.at(step, batches.len());
                optimizer.step(&mut model, &gradients, rate).unwrap();
                worst[0] = worst[0].max((loss.item().unwrap() / losses[step] - 1.0).abs());
                worst[1] = worst[1].max((norm / norms[step] - 1.0).abs());
            }
            println!("{method} {dtype}: losses {:.1e}, norms {:.1e}", worst[0], worst[1]);
            assert!(worst[0] <= tolerance, "{method} {dtype}: {worst:?}");
            if steps == batches.len() {
                let first = common::batch(&rows, Some(batches[0]));
                let got = values(&model.forward(&first, &Context::eval()).unwrap());
                close(&format!("{method} after training"), &got, &expected(&peft, "logits_f64"), tolerance);
            }
        }
    }
}

#[test]
fn the_adapter_after_training_gives_pefts_logits() {
    let folder = oracle("peft_training");
    let rows = tensors(&folder.join("rows.safetensors"));
    let (order, sizes) = rows.integers("batches").unwrap();
    let first: Vec<usize> = order[..sizes[1]].iter().map(|&row| row as usize).collect();
    for method in ["randlora", "lora"] {
        let mut model = base("peft_training", DType::F64);
        PeftAdapter::open(&folder.join(format!("{method}-trained"))).unwrap().attach(&mut model).unwrap();
        let got = values(&model.forward(&batch(&rows, Some(&first)), &Context::eval()).unwrap());
        // The logits are from before the adapter was narrowed to f32.
        let want = expected(&tensors(&folder.join(format!("{method}.safetensors"))), "logits_f64");
        close(&format!("{method}-trained"), &got, &want, OUTPUTS[0].1);
    }
}

/// Fails unless the adapter is refused, by an error with these parts that names its file and leaves the
/// model as it was.
fn refused(folder: &Path, parts: &[&str]) {
    let mut model = base("peft_adapters", DType::F32);
    let before = logits(&model);
    let error = PeftAdapter::open(folder).and_then(|adapter| adapter.attach(&mut model)).unwrap_err();
    says(&error, parts);
    says(&error, &[&folder.display().to_string()]);
    assert!(model.linears().iter().all(|(_, layer)| layer.adapter().is_none()));
    assert_eq!(logits(&model), before);
}

/// An adapter of one case's configuration and another's tensors.
fn combined(name: &str, config: &str, tensors: &str) -> Folder {
    Folder::with(name, &[adapter(config).join(CONFIG), adapter(tensors).join(TENSORS)])
}

#[test]
fn what_is_not_computed_here_is_refused() {
    for (case, tensors, part) in [
        ("ia3", "lora", "IA3"),
        ("rank-pattern", "lora", r"`rank_pattern`: `(?i)layer\.\d\.attention.self.query` is an expression"),
        ("alpha-pattern", "lora", "`alpha_pattern`: `(que)ry(?=$)` is an expression"),
    ] {
        refused(&combined(case, &format!("refused/{case}"), tensors).0, &[CONFIG, part]);
    }
    let value = "base_model.model.bert.encoder.layer.1.attention.self.value.randlora_";
    for (case, parts) in [
        ("bases-differ", [&format!("`{value}A`"), "differ"]),
        ("no-lambda", ["there is no tensor", &format!("`{value}lambda`")]),
        ("no-classifier-bias", ["`base_model.model.classifier.bias`", "missing"]),
        ("small-bases", ["larger than the bases", "[19, 4, 5]"]),
    ] {
        refused(&adapter("refused").join(case), &[&[TENSORS], &parts[..]].concat());
    }
}

#[test]
fn an_adapter_that_was_only_loaded_is_saved_bit_for_bit() {
    for case in cases() {
        let opened = PeftAdapter::open(&adapter(&case)).unwrap();
        let mut model = base("peft_adapters", DType::F32);
        opened.attach(&mut model).unwrap();
        let folder = Folder::with(&format!("like-{case}"), &[]);
        opened.save(&model, &folder.0).unwrap();
        let (got, mut want) = (contents(&folder.0.join(TENSORS)), contents(&adapter(&case).join(TENSORS)));
        if case == "randlora-per-layer" {
            want = contents(&adapter("randlora-shared").join(TENSORS));
        }
        assert!(got == want, "{case}: {:?} and {:?}", got.keys(), want.keys());
        assert_eq!(json(&folder.0.join(CONFIG)), json(&adapter(&case).join(CONFIG)), "{case}");
        assert_eq!(logits(&adapted(&folder.0, DType::F32)), logits(&model), "{case}");
    }
}

/// What PEFT saves after it has loaded our files (made by tests/oracle/round_trip.py).
#[test]
fn what_went_to_peft_and_came_back_is_the_same() {
    let folders = fs::read_dir(oracle("round_trip")).unwrap().map(|entry| entry.unwrap().path());
    let mut count = 0;
    for folder in folders {
        let case = folder.file_name().unwrap().to_str().unwrap();
        let methods = oracle("peft_methods").join(case);
        let model = adapted(&if methods.is_dir() { methods } else { adapter(case) }, DType::F32);
        let ours = Folder::with(&format!("round-{case}"), &[]);
        save_peft(&model, &ours.0, &PeftTask::default()).unwrap();
        let (got, want) = (contents(&folder.join(TENSORS)), contents(&ours.0.join(TENSORS)));
        assert!(got == want, "{case}: {:?} and {:?}", got.keys(), want.keys());
        assert_eq!(logits(&adapted(&folder, DType::F32)), logits(&model), "{case}");
        count += 1;
    }
    assert_eq!(count, 15);
}

#[test]
fn what_is_not_read_of_a_configuration_is_kept() {
    let folder = combined("kept", "lora-bf16", "lora-bf16");
    folder.edit(CONFIG, "\"revision\": null", "\"revision\": \"main\", \"of_tomorrow\": null");
    let opened = PeftAdapter::open(&folder.0).unwrap();
    let mut model = base("peft_adapters", DType::F32);
    opened.attach(&mut model).unwrap();
    // Trained on: what bf16 no longer holds is f32 from now on, the rest stays.
    let name = "bert.encoder.layer.0.attention.self.query.lora.a";
    model
        .try_visit_mut(&mut |at, item| match item {
            ItemMut::Parameter(p) if at == name => p.set(p.value().scale(1.1)?),
            _ => Ok(()),
        })
        .unwrap();
    let saved = Folder::with("kept-saved", &[]);
    opened.save(&model, &saved.0).unwrap();
    assert_eq!(json(&saved.0.join(CONFIG)), json(&folder.0.join(CONFIG)));
    let wide: Vec<String> = contents(&saved.0.join(TENSORS))
        .into_iter()
        .filter(|(_, t)| t.0 == "F32")
        .map(|(name, _)| name)
        .collect();
    assert_eq!(wide, ["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"]);

    // Another adapter's settings are not written over this one's.
    let mut other = base("peft_adapters", DType::F32);
    attach(&mut other, &Lora { rank: 2, ..Lora::default() }, &Targets::names(&["query"]), &[]).unwrap();
    says(&opened.save(&other, &saved.0).unwrap_err(), &["other settings", "save_peft"]);
}

#[test]
fn how_the_model_stores_its_weights_is_no_matter_of_the_adapter() {
    let folder = combined("fan", "lora", "lora");
    folder.edit(CONFIG, "\"fan_in_fan_out\": false", "\"fan_in_fan_out\": true");
    assert_eq!(logits(&adapted(&folder.0, DType::F32)), logits(&adapted(&adapter("lora"), DType::F32)));
}

#[test]
fn bases_that_were_drawn_in_f16() {
    let case = adapter("randlora-seed-only");
    let mut model = base("peft_adapters", DType::F32);
    PeftAdapter::open(&case).unwrap().drawn_in(DType::F16).attach(&mut model).unwrap();
    let (f16, bf16) = (logits(&model), logits(&adapted(&case, DType::F32)));
    let apart = distance(&f16, &bf16) / largest(&bf16);
    assert!(apart > 1e-4 && apart < 0.05, "{apart}");
    // The other way round: what is stored is not drawn.
    let mut model = base("peft_adapters", DType::F32);
    PeftAdapter::open(&adapter("randlora")).unwrap().drawn_in(DType::F16).attach(&mut model).unwrap();
    assert_eq!(logits(&model), logits(&adapted(&adapter("randlora"), DType::F32)));
}

#[test]
fn patterns_that_contradict_each_other_or_the_tensors() {
    for (i, (patterns, part)) in [
        ("{\"query\": 2}", "[3, 12], but adapter_config.json says that `r` is 2"),
        ("{\"query\": 2, \"self.query\": 3}", "contradicts another pattern"),
        ("{\"query\": \"2\"}", "`query` has no number"),
        ("{\"query\": 0}", "the rank 0"),
        ("[2]", "`rank_pattern` is [2], not an object"),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = combined(&format!("patterns-{i}"), "lora", "lora");
        folder.edit(CONFIG, "\"rank_pattern\": {}", &format!("\"rank_pattern\": {patterns}"));
        refused(&folder.0, &[part]);
    }
}

#[test]
fn biases_that_are_promised_and_missing() {
    let folder = combined("no-bias", "lora-bias-only", "lora-bias-only");
    let missing = "bert.encoder.layer.1.attention.self.key.base_layer.bias";
    let keep = |name: &str| (!name.contains(missing)).then(|| name.into());
    folder.rename(&adapter("lora-bias-only").join(TENSORS), TENSORS, keep);
    refused(&folder.0, &["layer.1.attention.self.key.bias` is missing"]);
    let folder = combined("two-biases", "lora-bias-only", "lora-bias-only");
    let name = "base_model.model.bert.encoder.layer.1.attention.self.key.";
    let double = |key: &str| {
        let other = "layer.0.attention.self.key.base_layer.bias";
        Some(if key.ends_with(other) { format!("{name}bias") } else { key.into() })
    };
    folder.rename(&adapter("lora-bias-only").join(TENSORS), TENSORS, double);
    refused(&folder.0, &[&format!("`{name}bias` and `{name}base_layer.bias` are the same parameter")]);
    let folder = combined("other-bias", "lora-bias-only", "lora-bias-only");
    folder.edit(CONFIG, "\"lora_only\"", "\"some\"");
    refused(&folder.0, &[CONFIG, "`bias` is \"some\"", "lora_only"]);
}

#[test]
fn settings_of_other_methods_are_refused() {
    let start = ("\"init_lora_weights\": true", "\"init_lora_weights\": \"olora\"", "path_initial_model");
    let unknown =
        ("\"kasa_config\": null", "\"kasa_config\": {\"beta\": 1}", "`kasa_config` is {\"beta\":1}");
    let new = ("\"use_bdlora\": null", "\"use_something_new\": true", "`use_something_new` is true");
    for (i, (from, to, part)) in [start, unknown, new].into_iter().enumerate() {
        let folder = combined(&format!("settings-{i}"), "lora", "lora");
        folder.edit(CONFIG, from, to);
        refused(&folder.0, &[CONFIG, part]);
    }
    let folder = combined("gaussian", "lora", "lora");
    folder.edit(CONFIG, start.0, "\"init_lora_weights\": \"gaussian\"");
    adapted(&folder.0, DType::F32);
}

/// The LoRA of the tests with only the tensors that `keep` renames.
fn lora_with(name: &str, keep: impl Fn(&str) -> Option<String>) -> Folder {
    let folder = combined(name, "lora", "lora");
    folder.rename(&adapter("lora").join(TENSORS), TENSORS, keep);
    folder
}

#[test]
fn what_is_promised_is_there_and_nothing_else() {
    let folder = lora_with("promised", |name| (!name.contains("classifier")).then(|| name.into()));
    refused(&folder.0, &["`base_model.model.classifier.bias` is missing"]);
    let folder = combined("targets", "lora", "lora");
    folder.edit(CONFIG, "\"value\"", "\"key\"");
    refused(&folder.0, &["attention.self.value` has an adapter, but is not among `target_modules`"]);
    // A name's last part is not the name.
    let layer = "bert.encoder.layer.0.attention.self.query";
    let folder = lora_with("short", |name| name.contains(layer).then(|| name.replace(layer, "query")));
    folder.edit(CONFIG, WHOLE, "");
    refused(&folder.0, &["`query` may be one of several layers"]);
}

/// The modules that PEFT trains whole, as they are in adapter_config.json.
const WHOLE: &str = "\n    \"classifier\",\n    \"score\"\n  ";

#[test]
fn an_adapter_of_the_inner_model() {
    let inner = lora_with("inner", |name| {
        (!name.contains("classifier")).then(|| name.replace("model.bert.", "model."))
    });
    inner.edit(CONFIG, WHOLE, "");
    let outer = lora_with("outer", |name| (!name.contains("classifier")).then(|| name.into()));
    outer.edit(CONFIG, WHOLE, "");
    let [inner, outer] = [inner, outer].map(|folder| logits(&adapted(&folder.0, DType::F32)));
    assert_eq!(inner, outer);
    assert!(distance(&inner, &logits(&base("peft_adapters", DType::F32))) > 1e-3);
}

#[test]
fn a_scale_comes_back() {
    for (rank, scale) in [(3, 2.0), (3, 1.0 / 3.0), (1, 1e-10), (7, 20.0), (5, 0.3)] {
        let mut model = base("peft_adapters", DType::F64);
        let method = Lora { rank, scale, ..Lora::default() };
        attach(&mut model, &method, &Targets::names(&["query"]), &["classifier"]).unwrap();
        let folder = Folder::with(&format!("scale-{rank}-{scale}"), &[]);
        save_peft(&model, &folder.0, &PeftTask::default()).unwrap();
        assert_eq!(PeftAdapter::open(&folder.0).unwrap().config().scale, scale, "{rank}");
    }
}

#[test]
fn a_module_that_is_trained_in_part_is_saved_whole() {
    let mut model = base("peft_adapters", DType::F32);
    attach(&mut model, &Lora::default(), &Targets::names(&["query"]), &["classifier.bias"]).unwrap();
    let folder = Folder::with("part", &[]);
    save_peft(&model, &folder.0, &PeftTask::default()).unwrap();
    assert_eq!(logits(&adapted(&folder.0, DType::F32)), logits(&model));
}

#[test]
fn numbers_that_contradict_each_other_are_refused() {
    for (i, (case, from, to, parts)) in [
        ("randlora", "\"r\": 5", "\"r\": 4", ["randlora_lambda` is [5, 3]", "says that `r` is 4"]),
        ("lora", "\"r\": 3", "\"r\": 4", ["lora_A", "[3, 12]"]),
        ("lora", "\"r\": 3", "\"r\": 0", [CONFIG, "`r` is 0"]),
        ("lora", "\"r\": 3", "\"r\": 3.5", [CONFIG, "`r` is 3.5"]),
        ("lora", "\"r\": 3", "\"r\": 9007199254740993", ["lora_A", "[3, 12]"]),
        ("lora", "\"lora_dropout\": 0.0", "\"lora_dropout\": 1.5", [CONFIG, "lora_dropout"]),
        ("randlora", "\"randlora_dropout\": 0.0", "\"randlora_dropout\": -1", [CONFIG, "randlora_dropout"]),
        ("lora", "\"lora_alpha\": 12", "\"lora_alpha\": \"12\"", [CONFIG, "`lora_alpha` is \"12\""]),
        ("lora", "\"peft_type\": \"LORA\"", "\"peft_type\": null", [CONFIG, "`peft_type` is missing"]),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = combined(&format!("numbers-{i}"), case, case);
        folder.edit(CONFIG, from, to);
        refused(&folder.0, &parts);
    }
}

#[test]
fn folders_that_are_no_adapters_and_adapters_of_other_models() {
    refused(&adapter("nowhere"), &["there is no such folder"]);
    refused(&adapter("lora").join(TENSORS), &["no"]);
    let folder = Folder::with("halves", &[adapter("lora").join(TENSORS)]);
    refused(&folder.0, &["adapter_config.json is missing"]);
    let folder = Folder::with("other-half", &[adapter("lora").join(CONFIG)]);
    refused(&folder.0, &[TENSORS]);

    // The model of the training is twice as wide.
    refused(&oracle("peft_training/lora"), &[TENSORS, "[3, 24]", "[3, 12]"]);

    // Another family's names: all of this model's are listed.
    let folder = combined("names", "lora", "lora");
    let rename = |name: &str| Some(name.replace("bert.encoder.layer", "gpt.h"));
    folder.rename(&adapter("lora").join(TENSORS), TENSORS, rename);
    let mut model = base("peft_adapters", DType::F32);
    let error = PeftAdapter::open(&folder.0).unwrap().attach(&mut model).unwrap_err();
    assert!(matches!(&error, Error::NoMatch { available, .. } if available.len() == 14), "{error:?}");
    says(
        &error,
        &["`gpt.h.0.attention.self.query` matches no layer", "bert.encoder.layer.0.attention.self.query"],
    );
    let error = attach(&mut model, &Lora::default(), &Targets::names(&["q_proj"]), &[]).unwrap_err();
    says(&error, &["`q_proj` matches no layer", "bert.pooler.dense"]);
    assert!(model.linears().iter().all(|(_, layer)| layer.adapter().is_none()));

    // One adapter at a time.
    let adapter = PeftAdapter::open(&adapter("lora")).unwrap();
    adapter.attach(&mut model).unwrap();
    assert!(matches!(adapter.attach(&mut model), Err(Error::Config { .. })));
}
