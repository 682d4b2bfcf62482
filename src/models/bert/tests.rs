use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::device::Device;
use crate::dtype::DType;
use crate::gradcheck;
use crate::nn::{Module, TokenIds};

fn small() -> BertConfig {
    BertConfig {
        vocab: 11,
        width: 8,
        layers: 2,
        heads: 2,
        hidden: 12,
        positions: 6,
        segments: 2,
        labels: 3,
        std: 0.5,
        ..BertConfig::default()
    }
}

fn model(config: BertConfig) -> Bert {
    Bert::init(&Init::seeded(4, &Device::cpu()), config).unwrap()
}

/// A pair, a text with a hidden token, and a short one.
fn rows() -> [TokenIds; 3] {
    let pair = TokenIds { ids: vec![1, 5, 2, 7, 2], segments: vec![0, 0, 0, 1, 1], mask: vec![] };
    let hidden = TokenIds { ids: vec![1, 9, 10, 2], mask: vec![true, true, false, true], ..pair.clone() };
    let hidden = TokenIds { segments: vec![0, 1, 0, 0], ..hidden };
    [pair, hidden, TokenIds { ids: vec![1, 2], ..TokenIds::default() }]
}

fn batch(rows: &[TokenIds]) -> TokenBatch {
    TokenBatch::pad(&rows.iter().collect::<Vec<_>>(), 0).unwrap()
}

#[test]
fn gradients() {
    let mut model = model(small());
    model.cast(DType::F64).unwrap();
    let batch = batch(&rows());
    gradcheck::model(&mut model, |m, ctx| m.forward(&batch, ctx)).unwrap();
    gradcheck::model(&mut model, |m, _| m.forward(&batch, &Context::train(5, 0))).unwrap();
    let loss = |m: &Bert, ctx: &Context| m.forward(&batch, ctx)?.cross_entropy(&[0, 2, 1], None, 0.0);
    gradcheck::model(&mut model, loss).unwrap();
}

/// BERT written out once more, from a state and its names alone.
fn written_out(state: &BTreeMap<String, Tensor>, config: &BertConfig, batch: &TokenBatch) -> Result<Tensor> {
    let [b, t] = [batch.ids.shape()[0], batch.ids.shape()[1]];
    let of = |name: String| &state[&name];
    let linear = |x: &Tensor, at: &str| x.linear(of(format!("{at}.weight")), Some(of(format!("{at}.bias"))));
    let norm = |x: &Tensor, at: &str| {
        x.layer_norm(Some(of(format!("{at}.weight"))), Some(of(format!("{at}.bias"))), config.eps)
    };
    let table = |name: &str| of(format!("bert.embeddings.{name}_embeddings.weight"));
    let hide = |key: &bool| if *key { 0.0 } else { -1e30 };
    let mask: Vec<f64> = match &batch.keys {
        Some(keys) => keys.iter().map(hide).collect(),
        None => vec![0.0; b * t],
    };
    let mask = Tensor::from_vec(mask, [b, 1, 1, t], table("word").device())?;
    let size = config.width / config.heads;
    let heads = |x: &Tensor| x.reshape([b, t, config.heads, size])?.transpose(1, 2);

    let x = table("word").embedding(&batch.ids)?.add(&table("position").slice(0, 0..t)?)?;
    let x = x.add(&table("token_type").embedding(&batch.segments)?)?;
    let mut x = norm(&x, "bert.embeddings.LayerNorm")?;
    for i in 0..config.layers {
        let at = |part: &str| format!("bert.encoder.layer.{i}.{part}");
        let [q, k, v] =
            ["query", "key", "value"].map(|part| heads(&linear(&x, &at(&format!("attention.self.{part}")))?));
        let scores = q?.matmul(&k?.t()?)?.scale(1.0 / (size as f64).sqrt())?.add(&mask)?;
        let seen = scores.softmax(3)?.matmul(&v?)?.transpose(1, 2)?.reshape([b, t, config.width])?;
        let y = linear(&seen, &at("attention.output.dense"))?;
        x = norm(&x.add(&y)?, &at("attention.output.LayerNorm"))?;
        let y = linear(&linear(&x, &at("intermediate.dense"))?.gelu()?, &at("output.dense"))?;
        x = norm(&x.add(&y)?, &at("output.LayerNorm"))?;
    }
    linear(&linear(&x.select(1, 0)?, "bert.pooler.dense")?.tanh()?, "classifier")
}

#[test]
fn the_model_is_what_is_written_out() {
    let mut model = model(small());
    model.cast(DType::F64).unwrap();
    let [pair, hidden, short] = rows();
    for rows in [&[pair.clone(), hidden, short][..], &[pair]] {
        let got = model.forward(&batch(rows), &Context::eval()).unwrap().to_vec::<f64>().unwrap();
        let want = written_out(&model.state(), model.config(), &batch(rows)).unwrap();
        for (got, want) in got.iter().zip(want.to_vec::<f64>().unwrap()) {
            assert!((got - want).abs() < 1e-12, "{got} {want}");
        }
    }
}

#[test]
fn names_are_those_of_the_checkpoints() {
    let model = Bert::init(&Init::blank(&Device::cpu()), small()).unwrap();
    let names: Vec<(String, Vec<usize>)> =
        model.parameters().into_iter().map(|(name, p)| (name, p.value().dims().to_vec())).collect();
    let has = |name: &str, dims: &[usize]| assert!(names.contains(&(name.into(), dims.into())), "{name}");
    has("bert.embeddings.word_embeddings.weight", &[11, 8]);
    has("bert.embeddings.position_embeddings.weight", &[6, 8]);
    has("bert.embeddings.token_type_embeddings.weight", &[2, 8]);
    has("bert.embeddings.LayerNorm.weight", &[8]);
    has("bert.embeddings.LayerNorm.bias", &[8]);
    for i in 0..2 {
        let part = |part: &str, dims: &[usize]| {
            has(&format!("bert.encoder.layer.{i}.{part}.weight"), dims);
            has(&format!("bert.encoder.layer.{i}.{part}.bias"), &dims[..1]);
        };
        part("attention.self.query", &[8, 8]);
        part("attention.self.key", &[8, 8]);
        part("attention.self.value", &[8, 8]);
        part("attention.output.dense", &[8, 8]);
        part("attention.output.LayerNorm", &[8]);
        part("intermediate.dense", &[12, 8]);
        part("output.dense", &[8, 12]);
        part("output.LayerNorm", &[8]);
    }
    has("bert.pooler.dense.weight", &[8, 8]);
    has("bert.pooler.dense.bias", &[8]);
    has("classifier.weight", &[3, 8]);
    has("classifier.bias", &[3]);
    assert_eq!(names.len(), 5 + 2 * 16 + 4);
}

#[test]
fn as_many_numbers_as_the_published_models() {
    let device = Device::cpu();
    let count = |config| {
        let model = Bert::init(&Init::blank(&device), config).unwrap();
        assert!(device.memory().live_bytes < 10_000);
        model.parameter_count()
    };
    let base = BertConfig { labels: 0, ..BertConfig::default() };
    assert_eq!(count(base), 109_482_240);
    assert_eq!(count(BertConfig::default()), 109_482_240 + 2 * 768 + 2);
    let mini = BertConfig { width: 384, layers: 6, hidden: 1536, ..base };
    assert_eq!(count(mini), 22_713_216);
}

#[test]
fn first_values() {
    let model = model(BertConfig { width: 48, hidden: 96, std: 0.02, ..small() });
    for (name, p) in model.parameters() {
        let values = p.value().to_vec::<f32>().unwrap();
        let square = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        let (want, tolerance) = match name.as_str() {
            _ if name.ends_with("bias") => (0.0, 0.0),
            _ if name.contains("LayerNorm") => (1.0, 0.0),
            _ => (0.02, 0.004),
        };
        assert!((square.sqrt() - want).abs() <= tolerance, "{name}: {square}");
    }
}

#[test]
fn padding_and_hidden_tokens_change_nothing() {
    let model = model(small());
    let logits =
        |rows: &[TokenIds]| model.forward(&batch(rows), &Context::eval()).unwrap().to_vec::<f32>().unwrap();
    let alone: Vec<f32> = rows().chunks(1).flat_map(logits).collect();
    assert_eq!(alone.len(), 9);
    let [pair, hidden, short] = rows();
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(close(&logits(&[pair.clone(), hidden.clone(), short.clone()]), &alone));
    let other = TokenIds { ids: vec![1, 9, 3, 2], ..hidden };
    assert!(close(&logits(&[pair.clone(), other.clone()]), &alone[..6]));
    let seen = TokenIds { mask: vec![], ..other };
    assert!(!close(&logits(&[pair.clone(), seen]), &alone[..6]));
    let flat = TokenIds { segments: vec![], ..pair };
    assert!(!close(&logits(&[flat]), &alone[..3]));
    // Where nothing may be attended to there are numbers all the same.
    let batch = TokenBatch { keys: Some(Arc::from([false, false])), ..batch(&[short]) };
    let y = model.forward(&batch, &Context::eval()).unwrap().to_vec::<f32>().unwrap();
    assert!(y.iter().all(|y| y.is_finite()));
}

#[test]
fn each_rate_drops_in_its_own_place() {
    let none = BertConfig { dropout: 0.0, attention_dropout: 0.0, classifier_dropout: Some(0.0), ..small() };
    let run = |config, layers, ctx: &Context| {
        let model = model(BertConfig { layers, ..config });
        let batch = batch(&rows());
        let hidden = model.hidden(&batch, ctx).unwrap().to_vec::<f32>().unwrap();
        (hidden, model.forward(&batch, ctx).unwrap().to_vec::<f32>().unwrap())
    };
    let train = Context::train(1, 0);
    let plain = [run(none, 0, &Context::eval()), run(none, 1, &Context::eval())];
    assert_eq!([run(none, 0, &train), run(none, 1, &train)], plain);
    // The attention's rate: in the blocks alone.
    let attention = BertConfig { attention_dropout: 0.5, ..none };
    assert_eq!(run(attention, 0, &train), plain[0]);
    assert_ne!(run(attention, 1, &train).0, plain[1].0);
    // The classifier's rate: before the classifier alone.
    let classifier = BertConfig { classifier_dropout: Some(0.5), ..none };
    let (hidden, logits) = run(classifier, 1, &train);
    assert!(hidden == plain[1].0 && logits != plain[1].1);
    // The embeddings' norm comes before their dropout: about half of what it gives is 0.
    let (hidden, logits) = run(BertConfig { dropout: 0.5, ..none }, 0, &train);
    let zeros = hidden.iter().filter(|x| **x == 0.0).count();
    assert!((30..90).contains(&zeros), "{zeros} of {}", hidden.len());
    // Without a rate of its own the classifier has that of the rest.
    let (same, dropped) = run(BertConfig { dropout: 0.5, classifier_dropout: None, ..none }, 0, &train);
    assert!(same == hidden && dropped != logits);
    assert_eq!(run(small(), 1, &Context::eval()), plain[1]);
}

/// The bits of the loss and of all gradients of a training step.
fn bits(threads: usize) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let config = BertConfig { vocab: 90, width: 64, heads: 4, hidden: 160, positions: 40, ..small() };
        let model = model(config);
        let row = |i: usize| TokenIds {
            ids: (0..40 - 2 * i).map(|j| ((7 * i + 5 * j) % 90) as u32).collect(),
            ..TokenIds::default()
        };
        let batch = batch(&(0..12).map(row).collect::<Vec<_>>());
        let targets: Vec<u32> = (0..12).map(|i| i % 3).collect();
        let loss = model.forward(&batch, &Context::train(3, 1)).unwrap();
        let loss = loss.cross_entropy(&targets, None, 0.0).unwrap();
        let mut bits = vec![(loss.item().unwrap() as f32).to_bits()];
        let gradients = loss.backward().unwrap();
        for (_, p) in model.parameters() {
            let gradient = gradients.get(p.leaf()).unwrap().to_vec::<f32>().unwrap();
            bits.extend(gradient.into_iter().map(f32::to_bits));
        }
        bits
    })
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let one = bits(1);
    assert!((2..=7).all(|threads| bits(threads) == one));
}

#[test]
fn nobody_is_a_batch_too() {
    let (model, nobody) = (model(small()), TokenBatch::pad(&[], 0).unwrap());
    for ctx in [Context::eval(), Context::train(0, 0)] {
        assert_eq!(model.forward(&nobody, &ctx).unwrap().dims(), [0, 3]);
        assert_eq!(model.hidden(&nobody, &ctx).unwrap().dims(), [0, 1, 8]);
    }
}

#[test]
fn batches_that_do_not_fit() {
    let of =
        |model: &Bert, batch: TokenBatch| model.forward(&batch, &Context::eval()).unwrap_err().to_string();
    let one = model(small());
    let ids = |ids: &[u32], dims: &[usize]| Ids::new(ids, dims).unwrap();
    let plain = |tokens: &[u32]| TokenBatch {
        ids: ids(tokens, &[1, tokens.len()]),
        segments: ids(&vec![0; tokens.len()], &[1, tokens.len()]),
        keys: None,
    };
    assert_eq!(
        of(&one, plain(&[1; 7])),
        "bert: rows of 7 tokens where the model reads 1 to 6: truncate what is longer"
    );
    assert_eq!(
        of(&one, plain(&[])),
        "bert: rows of 0 tokens where the model reads 1 to 6: truncate what is longer"
    );
    assert_eq!(
        of(&one, plain(&[1, 11])),
        "token 11: the model has 11, from 0 on: was the text tokenised for another model?"
    );
    assert_eq!(
        of(&one, TokenBatch { segments: ids(&[0, 2], &[1, 2]), ..plain(&[1, 2]) }),
        "segment 2: the model has 2, from 0 on: was the text tokenised for another model?"
    );
    assert_eq!(
        of(&one, TokenBatch { segments: ids(&[0], &[1, 1]), ..plain(&[1, 2]) }),
        "bert: segments of [1, 1] for ids of [1, 2]"
    );
    assert_eq!(
        of(&one, TokenBatch { ids: ids(&[1], &[1]), ..plain(&[1]) }),
        "bert: ids of [1] where (batch, places) is needed"
    );
    assert_eq!(
        of(&one, TokenBatch { keys: Some(Arc::from([true])), ..plain(&[1, 2]) }),
        "bert: a mask of 1 places for ids of [1, 2]"
    );
    let headless = model(BertConfig { labels: 0, ..small() });
    assert!(of(&headless, plain(&[1])).starts_with("labels: it is 0, so that the model has no classifier"));
    assert_eq!(headless.pooled(&plain(&[1]), &Context::eval()).unwrap().dims(), [1, 8]);
}

#[test]
fn sizes_that_make_no_model() {
    let small = small();
    for config in [
        BertConfig { vocab: 0, ..small },
        BertConfig { width: 0, ..small },
        BertConfig { hidden: 0, ..small },
        BertConfig { positions: 0, ..small },
        BertConfig { segments: 0, ..small },
        BertConfig { heads: 3, ..small },
        BertConfig { heads: 0, ..small },
        BertConfig { pad: 11, ..small },
        BertConfig { std: -1.0, ..small },
        BertConfig { std: f64::NAN, ..small },
    ] {
        let error = Bert::init(&Init::blank(&Device::cpu()), config).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }
    let huge = BertConfig { vocab: usize::MAX, ..small };
    assert!(Bert::init(&Init::blank(&Device::cpu()), huge).is_err());
}
