//! RandLoRA's bases against those that PEFT draws (made by tests/oracle/torch_bases.py).

use std::fs;

use crate::common::oracle;
use randlora::adapters::{TorchBases, TorchDraw};
use randlora::{DType, Device, Tensor};
use serde_json::Value;

/// FNV-1a over the bits.
fn hash(values: &[f32]) -> String {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

fn check(what: &str, ours: &Tensor, theirs: &Value) {
    let sizes: Vec<usize> =
        theirs["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let values = ours.to_vec::<f32>().unwrap();
    assert_eq!(values.len(), sizes.iter().product::<usize>(), "{what}");
    for sample in theirs["samples"].as_array().unwrap() {
        let place = sample[0].as_u64().unwrap() as usize;
        assert_eq!(values[place], sample[1].as_f64().unwrap() as f32, "{what} at {place}");
    }
    assert_eq!(hash(&values), theirs["hash"].as_str().unwrap(), "{what}");
}

/// Bit for bit, the sparse ones too: 9 seeds and sizes, from which each of A and B is 48 to 2.4 million numbers.
#[test]
fn every_bit_is_pefts() {
    let text = fs::read_to_string(oracle("torch_bases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 36);
    for case in &cases {
        let size = |value: &Value| value.as_u64().unwrap() as usize;
        let (outputs, inputs) = (size(&case["sizes"][0]), size(&case["sizes"][1]));
        let draw = match case["draw"].as_str().unwrap() {
            "bf16" => TorchDraw::Uniform(DType::BF16),
            "f16" => TorchDraw::Uniform(DType::F16),
            "sparse" => TorchDraw::Sparse,
            _ => TorchDraw::VerySparse,
        };
        let key = case["key"].as_u64().unwrap_or_else(|| case["key"].as_i64().unwrap() as u64);
        let (small, large) = (outputs.min(inputs), outputs.max(inputs));
        let spec = TorchBases { key, draw, rank: size(&case["rank"]), small, large };
        let bases = spec.generate(&Device::cpu()).unwrap();
        check(&format!("A of {spec:?}"), bases.a(), &case["a"]);
        check(&format!("B of {spec:?}"), &bases.b().unwrap(), &case["b"]);
    }
}
