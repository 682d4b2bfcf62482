//! Dropout with the mask that the CPU makes.

use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats};
use crate::error::Result;

static SOURCE: Source = Source { name: "dropout.cl", text: include_str!("../../kernels/dropout.cl") };

/// A mask: element i is kept where word i of a stream is at least `threshold`, and then multiplied by `scale`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    pub(crate) seed: u64,
    pub(crate) stream: u64,
    pub(crate) threshold: u64,
    pub(crate) scale: f64,
}

impl Mask {
    pub(super) fn args<'a>(&self) -> [Arg<'a>; 4] {
        [Arg::U64(self.seed), Arg::U64(self.stream), Arg::U64(self.threshold), Arg::F32(self.scale as f32)]
    }
}

/// x, whose elements lie one after another, times the mask.
pub(crate) fn masked(x: View<'_>, mask: Mask) -> Result<ClBuffer> {
    let (n, y) = (x.numel(), floats(x.runtime(), x.numel())?);
    let args = [&x.in_order()[..], &[Arg::Buffer(&y)], &mask.args(), &[Arg::Size(n)]];
    x.runtime().launch(&SOURCE, "dropout", &args.concat(), Grid::items(n.div_ceil(16)))?;
    Ok(y)
}
