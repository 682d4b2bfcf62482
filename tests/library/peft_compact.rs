//! The compact form: RandLoRA without its bases, read back bit for bit, and what it refuses.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{Folder, batch, load, oracle, says, tensors, values};
use randlora::adapters::{BasesOrigin, Distribution, Lora, Method, RandLora, Targets, attach};
use randlora::io::{Access, PeftAdapter, PeftTask, SafeTensors, save_compact, save_peft};
use randlora::models::{Bert, BertConfig};
use randlora::nn::{Context, Init, ItemMut, Module};
use randlora::{DType, Device, Pairing, Structure, Tensor};

const COMPACT: &str = "compact.safetensors";
const LAYERS: [&str; 4] = ["query", "value", "intermediate.dense", "output.dense"];

fn base() -> Bert {
    load(&oracle("peft_adapters/model"), Access::Map)
}

fn opened(folder: &Path) -> Bert {
    let mut model = base();
    PeftAdapter::open(folder).unwrap().attach(&mut model).unwrap();
    model
}

fn logits(model: &Bert) -> Vec<f64> {
    let inputs = tensors(&oracle("peft_adapters/inputs.safetensors"));
    values(&model.forward(&batch(&inputs, None), &Context::eval()).unwrap())
}

/// All that is trained, by the bits.
fn trained(model: &Bert) -> BTreeMap<String, Vec<u32>> {
    let trained = model.parameters().into_iter().filter(|(_, p)| p.is_trainable());
    let bits = |x: &Tensor| x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    trained.map(|(name, p)| (name, bits(p.value()))).collect()
}

/// A model with this adapter, whose numbers are no longer those that it began with.
fn adapted(method: &dyn Method, targets: &[&str]) -> Bert {
    let mut model = base();
    attach(&mut model, method, &Targets::names(targets), &["classifier"]).unwrap();
    let init = Init::seeded(3, &Device::cpu());
    model
        .try_visit_mut(&mut |name, item| match item {
            ItemMut::Parameter(p) if p.is_trainable() => p.set(init.normal(name, *p.value().shape(), 0.1)?),
            _ => Ok(()),
        })
        .unwrap();
    model
}

#[test]
fn all_comes_back_bit_for_bit() {
    let methods = [
        RandLora { rank: 5, scale: 1.0 / 3.0, seed: u64::MAX, ..RandLora::default() },
        RandLora { rank: 1, dropout: 0.1, pairing: Pairing::Peft, ..RandLora::default() },
        RandLora { rank: 12, distribution: Distribution::Normal, ..RandLora::default() },
        RandLora {
            rank: 7,
            distribution: Distribution::very_sparse(20),
            scale: 1e-30,
            ..RandLora::default()
        },
        RandLora { rank: 5, structure: Structure::Block, ..RandLora::default() },
    ];
    for (i, method) in methods.iter().enumerate() {
        let model = adapted(method, &LAYERS);
        let folder = Folder::with(&format!("compact-{i}"), &[]);
        save_compact(&model, &folder.0, Some("model")).unwrap();
        let again = opened(&folder.0);
        assert_eq!(trained(&again), trained(&model), "{method:?}");
        assert_eq!(logits(&again), logits(&model), "{method:?}");
        // And once more, by way of what was opened.
        let adapter = PeftAdapter::open(&folder.0).unwrap();
        let second = Folder::with(&format!("compact-{i}-again"), &[]);
        adapter.save(&again, &second.0).unwrap();
        let bytes = |folder: &Folder| fs::read(folder.0.join(COMPACT)).unwrap();
        assert_eq!(bytes(&second), bytes(&folder), "{method:?}");
        let config = adapter.config();
        assert_eq!((config.rank, config.scale, config.dropout), (method.rank, method.scale, method.dropout));
        assert!(matches!(adapter.origin(), Some(BasesOrigin::Spec(spec)) if spec.seed == method.seed));
    }
}

#[test]
fn what_peft_saved_becomes_compact_where_its_seed_makes_the_same_bases() {
    for case in
        ["randlora", "randlora-sparse", "randlora-very-sparse", "randlora-seed-only", "randlora-bias-all"]
    {
        let model = opened(&oracle("peft_adapters").join(case));
        let folder = Folder::with(&format!("compact-{case}"), &[]);
        save_compact(&model, &folder.0, None).unwrap();
        assert_eq!(logits(&opened(&folder.0)), logits(&model), "{case}");
        assert!(tensors(&folder.0.join(COMPACT)).entries().all(|(name, _)| !name.ends_with("randlora_B")));
    }
    // One number of the bases is another.
    let source = oracle("peft_adapters/randlora-shared");
    let folder = Folder::with("compact-changed", &[source.join("adapter_config.json")]);
    let file = tensors(&source.join("adapter_model.safetensors"));
    let tensor = |name: &str| {
        let x = file.tensor(name, &Device::cpu()).unwrap();
        let mut values = x.to_vec::<f32>().unwrap();
        values[0] += if name == "base_model.randlora_B" { 1.0 } else { 0.0 };
        (name.to_string(), Tensor::from_vec(values, x.dims(), &Device::cpu()).unwrap())
    };
    let changed: Vec<_> = file.entries().map(|(name, _)| tensor(name)).collect();
    let path = folder.0.join("adapter_model.safetensors");
    randlora::io::save_safetensors(&path, &changed, &[("format", "pt")]).unwrap();
    let error = save_compact(&opened(&folder.0), &folder.0, None).unwrap_err();
    says(&error, &["bases: they follow from no seed", "PEFT's form"]);
    assert!(!folder.0.join(COMPACT).exists());
}

#[test]
fn from_pefts_form_to_the_compact_one_and_back() {
    for structure in [Structure::Dense, Structure::Block] {
        let method = RandLora { rank: 5, seed: 9, structure, pairing: Pairing::Peft, ..RandLora::default() };
        there_and_back(&method);
    }
}

fn there_and_back(method: &RandLora) {
    let model = adapted(method, &LAYERS);
    let [peft, compact, again] =
        ["there", "between", "back"].map(|name| Folder::with(&format!("{name}-{:?}", method.structure), &[]));
    save_peft(&model, &peft.0, &PeftTask::default()).unwrap();
    // The file says what its bases follow from.
    let adapter = PeftAdapter::open(&peft.0).unwrap();
    assert!(matches!(adapter.origin(), Some(BasesOrigin::Spec(spec)) if spec.seed == 9));
    save_compact(&opened(&peft.0), &compact.0, None).unwrap();
    save_peft(&opened(&compact.0), &again.0, &PeftTask::default()).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        assert_eq!(fs::read(peft.0.join(file)).unwrap(), fs::read(again.0.join(file)).unwrap(), "{file}");
    }
    // A model in f64 has the same bases.
    let mut wide = base();
    wide.cast(DType::F64).unwrap();
    PeftAdapter::open(&compact.0).unwrap().attach(&mut wide).unwrap();
    let apart = crate::common::distance(&logits(&wide), &logits(&model));
    assert!(apart < 1e-4, "{apart}");
}

#[test]
fn what_has_no_compact_form() {
    let folder = Folder::with("compact-lora", &[]);
    let model = adapted(&Lora::default(), &LAYERS);
    says(&save_compact(&model, &folder.0, None).unwrap_err(), &["lora has none"]);
    says(&save_compact(&base(), &folder.0, None).unwrap_err(), &["the model has none to save"]);
    // PEFT cannot express this pairing, the compact form can.
    let model = adapted(&RandLora { rank: 5, ..RandLora::default() }, &LAYERS);
    says(&save_peft(&model, &folder.0, &PeftTask::default()).unwrap_err(), &["pairing"]);
}

/// A compact adapter with another text in its header, of the same length or filled up with blanks.
fn edited(name: &str, from: &str, to: &str) -> Folder {
    let model = adapted(&RandLora { rank: 5, ..RandLora::default() }, &LAYERS);
    let folder = Folder::with(name, &[]);
    save_compact(&model, &folder.0, None).unwrap();
    let bytes = fs::read(folder.0.join(COMPACT)).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    assert!(header.contains(from), "{header}");
    let header = header.replace(from, to);
    let mut new = (header.len() as u64).to_le_bytes().to_vec();
    new.extend(header.bytes().chain(bytes[8 + length..].iter().copied()));
    fs::write(folder.0.join(COMPACT), new).unwrap();
    folder
}

#[test]
fn hostile_headers() {
    for (i, (from, to, parts)) in [
        ("randlora compact 1", "randlora compact 2", ["the format is randlora compact 2", COMPACT]),
        (r#"\"method\":\"randlora\""#, r#"\"method\":\"lora\""#, ["`method` is not randlora", COMPACT]),
        (r#"\"structure\":\"dense\""#, r#"\"structure\":\"spiral\""#, ["`structure` is spiral", "update"]),
        (
            r#"\"distribution\":\"uniform\""#,
            r#"\"distribution\":\"cauchy\""#,
            ["`distribution` is cauchy", "update"],
        ),
        (r#"\"pairing\":\"paper\""#, r#"\"pairing\":\"plain\""#, ["`pairing` is plain", "update"]),
        (r#"\"from\":\"randlora\""#, r#"\"from\":\"numpy\""#, ["`from` is numpy", "update"]),
        (r#"\"large\":20"#, r#"\"large\":2000000000000"#, ["2000000000000", "layers of at most 20"]),
        (r#"\"large\":20"#, r#"\"large\":15"#, ["larger than the bases", COMPACT]),
        (r#"\"seed\":\"0\""#, r#"\"seed\":\"-1\""#, ["`seed` is \"-1\"", COMPACT]),
        (r#"\"scale\":\"0.25\""#, r#"\"scale\":\"much\""#, ["`scale` is \"much\"", COMPACT]),
        (r#"\"rank\":5"#, r#"\"rank\":0"#, ["`rank` is 0", COMPACT]),
        (r#"\"rank\":5"#, r#"\"rank\":6"#, ["`r` is 6", COMPACT]),
        (r#"\"dropout\":\"0\""#, r#"\"dropout\":\"2\""#, ["`dropout`", COMPACT]),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = edited(&format!("hostile-{i}"), from, to);
        let mut model = base();
        let error = PeftAdapter::open(&folder.0).and_then(|a| a.attach(&mut model)).unwrap_err();
        says(&error, &parts);
    }
    // A file that is cut short, and one of something else.
    let folder = edited("hostile-cut", "compact 1", "compact 1");
    let bytes = fs::read(folder.0.join(COMPACT)).unwrap();
    fs::write(folder.0.join(COMPACT), &bytes[..bytes.len() - 4]).unwrap();
    says(&PeftAdapter::open(&folder.0).unwrap_err(), &["cut short"]);
    fs::copy(oracle("peft_adapters/inputs.safetensors"), folder.0.join(COMPACT)).unwrap();
    says(&PeftAdapter::open(&folder.0).unwrap_err(), &["the format is"]);
    assert!(SafeTensors::open(&folder.0.join(COMPACT), Access::Read).is_ok());
}

/// A BERT with the layers of all-MiniLM-L6-v2, all of which are adapted; of the words' embeddings there is no need.
#[test]
fn small_and_quick_for_minilm() {
    let config = BertConfig {
        vocab: 10,
        width: 384,
        layers: 6,
        heads: 12,
        hidden: 1536,
        positions: 16,
        labels: 2,
        ..BertConfig::default()
    };
    let fresh = || Bert::init(&Init::seeded(0, &Device::cpu()), config).unwrap();
    let mut model = fresh();
    let method = RandLora { rank: 16, pairing: Pairing::Peft, ..RandLora::default() };
    attach(&mut model, &method, &Targets::AllLinear, &["classifier"]).unwrap();
    assert_eq!(model.trainable_count(), 37 * 24 * (16 + 384) + 770);
    let folder = Folder::with("compact-minilm", &[]);
    save_compact(&model, &folder.0, None).unwrap();
    let bytes = fs::metadata(folder.0.join(COMPACT)).unwrap().len();
    assert!(bytes < 1_600_000, "{bytes}");

    // The least of several: this machine may have more to do.
    let (mut all, mut bases) = (Duration::MAX, Duration::MAX);
    for _ in 0..7 {
        let mut model = fresh();
        let start = Instant::now();
        let adapter = PeftAdapter::open(&folder.0).unwrap();
        adapter.attach(&mut model).unwrap();
        all = all.min(start.elapsed());
        let start = Instant::now();
        adapter.origin().unwrap().generate(&Device::cpu()).unwrap();
        bases = bases.min(start.elapsed());
    }
    println!("{bytes} bytes, loaded in {all:.1?}, {bases:.1?} of it for the bases");
    assert!(all.saturating_sub(bases) < Duration::from_millis(50), "{all:?} with {bases:?} for the bases");
}
