//! A mapped model stays mapped while an adapter is trained on it: its weights take no memory of the
//! device, whatever type they are stored in.

use crate::common::{batch, oracle, tensors};
use randlora::adapters::{RandLora, Targets, attach};
use randlora::io::{Access, Checkpoint};
use randlora::models::{Bert, BertLoad};
use randlora::nn::{Context, Module};
use randlora::optim::{AdamW, Optimizer};
use randlora::{DType, Device};

#[test]
fn frozen_weights_stay_in_the_file() {
    for (case, dtype) in [("single_label", DType::F32), ("bf16", DType::BF16), ("plain_f16", DType::F16)] {
        let (folder, device) = (oracle("bert").join(case), Device::cpu());
        let checkpoint = Checkpoint::open(&folder, Access::Map).unwrap();
        let wanted = BertLoad { labels: Some(2), seed: 0 };
        let mut model = Bert::load(&checkpoint, wanted, &device).unwrap().0;
        let matrix_bytes = |model: &Bert| -> usize {
            let own = model.parameters().into_iter().filter(|(name, _)| !name.contains("randlora"));
            let parameters = own.map(|(_, p)| p.value().clone());
            let matrices = parameters.filter(|x| x.rank() > 1 && x.dtype() == dtype);
            matrices.map(|x| x.numel() * x.dtype().size()).sum()
        };
        // Vectors are widened, a new classifier is made; the matrices are not there.
        let matrices = matrix_bytes(&model);
        let loaded = device.memory().live_bytes;
        assert!(loaded < matrices / 2, "{case}: {loaded} bytes of {matrices}");

        let method = RandLora { rank: 4, ..RandLora::default() };
        attach(&mut model, &method, &Targets::names(&["query"]), &["classifier"]).unwrap();
        let trained: usize = model
            .parameters()
            .iter()
            .filter(|(_, p)| p.is_trainable())
            .map(|(_, p)| 4 * p.value().numel())
            .sum();
        let attached = device.memory().live_bytes;
        let rows = batch(&tensors(&folder.join("expected.safetensors")), None);
        let labels = vec![1; rows.ids.shape().dims()[0]];
        let mut optimizer = AdamW::new();
        for step in 0..3 {
            let output = model.forward(&rows, &Context::train(0, step)).unwrap();
            let gradients = output.cross_entropy(&labels, None, 0.0).unwrap().backward().unwrap();
            optimizer.step(&mut model, &gradients, 1e-3).unwrap();
        }
        // Two moments of each trained number, and nothing else.
        assert_eq!(device.memory().live_bytes - attached, 2 * trained, "{case}");
        assert_eq!(matrix_bytes(&model), matrices, "{case}: a weight changed its type");
    }
}
