//! RandLoRA's bases and VeRA's matrices, out of a file or drawn again.

use crate::adapters::{BasesOrigin, LayerInfo, TorchBases, TorchVera};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::peft::kind::Kind;
use crate::io::peft::{PeftAdapter, ROOT};
use crate::ops::randlora::{Bases, Pairing};
use crate::tensor::Tensor;

impl PeftAdapter {
    /// RandLoRA's bases in f32 as the file holds them, once or once for every layer; None where it holds none.
    ///
    /// # Errors
    /// [`Error::Data`] where they are missing, of other shapes, or not the same for all layers.
    pub fn bases(&self, device: &Device) -> Result<Option<Bases>> {
        let (Kind::RandLora(_), Some([a, b])) = (&self.config.kind, self.shared(device)?) else {
            return Ok(None);
        };
        let &[rank, 1, small] = a.dims() else {
            let message = format!("randlora_A is {:?}, not (r, 1, MIN)", a.dims());
            return Err(self.error(message));
        };
        Bases::new(&a.reshape([rank, small])?, &b, Pairing::Peft)
            .map_err(|error| self.of_file(error))
            .map(Some)
    }

    /// VeRA's A (r, at least in) and B (at least out, r) in f32, out of the file or drawn again.
    pub(super) fn vera_matrices(&self, layers: &[LayerInfo], device: &Device) -> Result<[Tensor; 2]> {
        if let Some(matrices) = self.shared(device)? {
            return Ok(matrices);
        }
        let Kind::Vera { key, .. } = self.config.kind else {
            return Err(self.error("nothing says what the matrices follow from"));
        };
        let largest = |size: fn(&LayerInfo) -> usize| layers.iter().map(size).max().unwrap_or(0);
        let (inputs, outputs) = (largest(|layer| layer.inputs), largest(|layer| layer.outputs));
        TorchVera { key, rank: self.config.rank, inputs, outputs }.generate(device)
    }

    /// The same error, of this file: what is in it does not fit together, or a layer.
    pub(super) fn of_file(&self, error: Error) -> Error {
        match error {
            Error::Shape { message, .. } => self.error(message),
            Error::Config { .. } => self.error(error.to_string()),
            other => other,
        }
    }

    /// The two tensors that all layers share, in f32; None where the file holds none.
    pub(super) fn shared(&self, device: &Device) -> Result<Option<[Tensor; 2]>> {
        let names = self.config.form().shared.filter(|_| self.config.stored && !self.compact);
        let Some([a, b]) = names.map(|names| names.map(|name| self.base(name, device))) else {
            return Ok(None);
        };
        Ok(Some([a?, b?]))
    }

    fn base(&self, name: &str, device: &Device) -> Result<Tensor> {
        let keys: Vec<&str> =
            self.file.entries().map(|(key, _)| key).filter(|key| key.ends_with(name)).collect();
        let once = format!("{ROOT}{name}");
        let Some(first) = keys.iter().find(|key| **key == once).or(keys.first()) else {
            return Err(self.error(format!("`{once}` is missing")));
        };
        let values = self.file.tensor(first, device)?.to_dtype(DType::F32)?;
        for key in &keys {
            let other = self.file.tensor(key, device)?.to_dtype(DType::F32)?;
            if other.dims() != values.dims() || other.to_vec::<f32>()? != values.to_vec::<f32>()? {
                return Err(Error::data(
                    self.file.what(),
                    format!("`{key}` and `{first}` differ: all layers share them"),
                ));
            }
        }
        Ok(values)
    }

    /// What the bases follow from for these layers: as the file says, or else as PEFT would draw them.
    pub(super) fn origin_for(&self, layers: &[LayerInfo]) -> Option<BasesOrigin> {
        let largest = |size: fn(&LayerInfo) -> usize| layers.iter().map(size).max().unwrap_or(0);
        let (inputs, outputs) = (largest(|layer| layer.inputs), largest(|layer| layer.outputs));
        let drawn = match self.config.kind {
            Kind::RandLora(draw) => draw,
            _ => None,
        };
        self.origin.filter(|_| self.compact || self.config.stored).or(drawn.map(|(key, draw)| {
            let (small, large) = (inputs.min(outputs), inputs.max(outputs));
            BasesOrigin::Torch(TorchBases { key, draw, rank: self.config.rank, small, large })
        }))
    }

    /// The bases for these layers, out of the file or made again, and what they follow from.
    pub(super) fn bases_for(
        &self,
        layers: &[LayerInfo],
        device: &Device,
    ) -> Result<(Bases, Option<BasesOrigin>)> {
        let origin = self.origin_for(layers);
        if let Some(bases) = self.bases(device)? {
            return Ok((without_zeros(bases, layers)?, origin));
        }
        let Some(origin) = origin else { return Err(self.error("nothing says what the bases follow from")) };
        // Room is made for what the layers need, not for what a file says.
        let (rank, sides) = match origin {
            BasesOrigin::Spec(spec) => (spec.rank, [spec.small, spec.large]),
            BasesOrigin::Torch(spec) => (spec.rank, [spec.small, spec.large]),
        };
        let largest = layers.iter().map(LayerInfo::large).max().unwrap_or(0);
        if rank != self.config.rank || sides.iter().any(|&side| side > largest) {
            let message = format!(
                "the bases are of rank {rank} for sides of {sides:?}, the adapter is of rank {} for layers of \
                 at most {largest}",
                self.config.rank
            );
            return Err(self.error(message));
        }
        Ok((origin.generate(device)?, Some(origin)))
    }
}

/// Block bases that were saved with their zeros, or else the same bases.
fn without_zeros(dense: Bases, layers: &[LayerInfo]) -> Result<Bases> {
    let mut counts = layers.iter().map(|layer| layer.small().div_ceil(dense.rank()));
    let Some(n) = counts.next() else { return Ok(dense) };
    match counts.all(|other| other == n) {
        true => Ok(dense.blocks(n)?.unwrap_or(dense)),
        false => Ok(dense),
    }
}
