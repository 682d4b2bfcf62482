//! The adapters of a folder's layers, before they have their values.

use std::sync::Arc;

use crate::adapters::{LayerInfo, Lora, LoraAdapter, RandLora, RandLoraAdapter};
use crate::error::Result;
use crate::io::peft::PeftAdapter;
use crate::io::peft::kind::Kind;
use crate::nn::LinearAdapter;

impl PeftAdapter {
    /// One adapter for each layer; layers have the names of the file.
    pub(super) fn make(&self, layers: &[LayerInfo]) -> Result<Vec<Box<dyn LinearAdapter>>> {
        match &self.config.kind {
            Kind::RandLora(_) => self.randlora(layers),
            Kind::Lora => self.each(layers, |layer, rank, scale, dropout| {
                LoraAdapter::new(&Lora { rank, scale, dropout, seed: 0 }, layer)
            }),
        }
    }

    /// The adapters of a method whose layers have nothing in common, by their ranks, scales and the dropout.
    fn each<A: LinearAdapter>(
        &self,
        layers: &[LayerInfo],
        adapter: impl Fn(&LayerInfo, usize, f64, f64) -> Result<A>,
    ) -> Result<Vec<Box<dyn LinearAdapter>>> {
        let one = |layer: &LayerInfo| {
            let (rank, scale) = self.config.of(&layer.name);
            Ok(Box::new(adapter(layer, rank, scale, self.config.dropout)?) as Box<dyn LinearAdapter>)
        };
        layers.iter().map(one).collect()
    }

    fn randlora(&self, layers: &[LayerInfo]) -> Result<Vec<Box<dyn LinearAdapter>>> {
        let Some(first) = layers.first() else { return Ok(vec![]) };
        let (bases, origin) = self.bases_for(layers, &first.device)?;
        let bases = Arc::new(bases.to_dtype(first.dtype)?);
        self.each(layers, |layer, rank, scale, dropout| {
            let settings = RandLora { rank, scale, dropout, pairing: bases.pairing(), ..RandLora::default() };
            let adapter = RandLoraAdapter::new(&settings, layer, bases.clone());
            Ok(adapter.map_err(|error| self.of_file(error))?.with_origin(origin))
        })
    }
}
