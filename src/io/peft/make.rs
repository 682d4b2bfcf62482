//! The adapters of a folder's layers, before they have their values.

use std::sync::Arc;

use crate::adapters::{
    AdaLora, AdaLoraAdapter, Dora, LayerInfo, Lora, Method, Pissa, RandLora, RandLoraAdapter, Vera,
    VeraAdapter,
};
use crate::error::Result;
use crate::io::peft::kind::Kind;
use crate::io::peft::{PeftAdapter, PeftConfig};
use crate::nn::LinearAdapter;

impl PeftAdapter {
    /// One adapter for each layer; layers have the names of the file.
    pub(super) fn make(&self, layers: &[LayerInfo]) -> Result<Vec<Box<dyn LinearAdapter>>> {
        match &self.config.kind {
            Kind::RandLora(_) => self.randlora(layers),
            Kind::Lora => self.each(layers, |rank, scale, dropout| {
                Box::new(Lora { rank, scale, dropout, ..Lora::default() })
            }),
            Kind::Dora => self.each(layers, |rank, scale, dropout| {
                Box::new(Dora { rank, scale, dropout, ..Dora::default() })
            }),
            Kind::Pissa => self.each(layers, |rank, scale, dropout| Box::new(Pissa { rank, scale, dropout })),
            Kind::Vera { d_initial, .. } => self.vera(layers, *d_initial),
            Kind::AdaLora(settings) => self.adalora(layers, settings),
        }
    }

    /// The adapters of a method whose layers have nothing in common, by a layer's rank and scale and the dropout.
    fn each(
        &self,
        layers: &[LayerInfo],
        method: impl Fn(usize, f64, f64) -> Box<dyn Method>,
    ) -> Result<Vec<Box<dyn LinearAdapter>>> {
        let mut made = Vec::with_capacity(layers.len());
        for layer in layers {
            let (rank, scale) = self.config.of(&layer.name);
            let adapters = method(rank, scale, self.config.dropout).adapters(std::slice::from_ref(layer));
            made.extend(adapters.map_err(|error| self.of_file(error))?.into_iter().flatten());
        }
        Ok(made)
    }

    fn randlora(&self, layers: &[LayerInfo]) -> Result<Vec<Box<dyn LinearAdapter>>> {
        let Some(first) = layers.first() else { return Ok(vec![]) };
        let PeftConfig { rank, scale, dropout, .. } = self.config;
        let (bases, origin) = self.bases_for(layers, &first.device)?;
        let bases = Arc::new(bases.to_dtype(first.dtype)?);
        let settings = RandLora { rank, scale, dropout, pairing: bases.pairing(), ..RandLora::default() };
        let one = |layer| {
            let adapter = RandLoraAdapter::new(&settings, layer, bases.clone());
            Ok(boxed(adapter.map_err(|error| self.of_file(error))?.with_origin(origin)))
        };
        layers.iter().map(one).collect()
    }

    fn vera(&self, layers: &[LayerInfo], d_initial: f64) -> Result<Vec<Box<dyn LinearAdapter>>> {
        let Some(first) = layers.first() else { return Ok(vec![]) };
        let PeftConfig { rank, dropout, .. } = self.config;
        let settings = Vera { rank, d_initial, dropout, ..Vera::default() };
        let [a, b] = self.vera_matrices(layers, &first.device)?;
        let shared = Arc::new([a.to_dtype(first.dtype)?, b.to_dtype(first.dtype)?]);
        let one = |layer| {
            let adapter = VeraAdapter::new(&settings, layer, &shared);
            Ok(boxed(adapter.map_err(|error| self.of_file(error))?))
        };
        layers.iter().map(one).collect()
    }

    /// AdaLoRA that goes on choosing, or one whose ranks are settled.
    fn adalora(&self, layers: &[LayerInfo], settings: &AdaLora) -> Result<Vec<Box<dyn LinearAdapter>>> {
        let PeftConfig { rank, scale, dropout, ref kept, .. } = self.config;
        // A budget that is no smaller than what there is takes nothing away.
        let settings =
            AdaLora { rank: settings.rank.min(rank), first_rank: rank, scale, dropout, ..*settings };
        if kept.is_empty() {
            let adapters = settings.adapters(layers).map_err(|error| self.of_file(error))?;
            return Ok(adapters.unwrap_or_default());
        }
        let one = |layer: &LayerInfo| {
            let kept = kept.get(&layer.name).cloned().unwrap_or_else(|| vec![true; rank]);
            Ok(boxed(AdaLoraAdapter::settled(&settings, layer, kept, layers.len())?))
        };
        layers.iter().map(one).collect()
    }
}

fn boxed(adapter: impl LinearAdapter) -> Box<dyn LinearAdapter> {
    Box::new(adapter)
}
