//! Cross entropy.

use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats, upload_words};
use crate::error::Result;

static SOURCE: Source = Source { name: "loss.cl", text: include_str!("../../kernels/loss.cl") };

/// Rows of logits that lie one after another, and the class that each should have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CrossEntropy<'a> {
    pub(crate) x: View<'a>,
    pub(crate) classes: usize,
    /// One for each row; `classes` or more for a row that does not count.
    pub(crate) targets: &'a [u32],
    pub(crate) smoothing: f64,
    /// The rows that count, 1 at least.
    pub(crate) count: f64,
}

impl CrossEntropy<'_> {
    fn targets(&self) -> Result<ClBuffer> {
        upload_words(self.x.runtime(), self.targets.iter().copied())
    }

    /// The loss, and for each row the three numbers that its gradient is made from.
    pub(crate) fn forward(&self) -> Result<(ClBuffer, ClBuffer)> {
        let (runtime, targets, rows) = (self.x.runtime(), self.targets()?, self.targets.len());
        let (y, sums) = (floats(runtime, 1)?, floats(runtime, 3 * rows)?);
        let ([x, x_at], targets) = (self.x.in_order(), Arg::Buffer(&targets));
        let args = [x, x_at, targets, Arg::Buffer(&sums), Arg::Size(self.classes)];
        runtime.launch(&SOURCE, "row_sums", &args, Grid::groups(rows))?;
        let sizes = [Arg::Size(rows), Arg::Size(self.classes)];
        let args = [&[x, x_at, targets, Arg::Buffer(&sums), Arg::Buffer(&y)][..], &sizes, &self.settings()];
        runtime.launch(&SOURCE, "cross_entropy", &args.concat(), Grid::groups(1))?;
        Ok((y, sums))
    }

    /// The gradient of the logits.
    pub(crate) fn vjp(&self, sums: View<'_>, dy: View<'_>) -> Result<ClBuffer> {
        let (runtime, targets, n) = (self.x.runtime(), self.targets()?, self.x.numel());
        let dx = floats(runtime, n)?;
        let args = [
            &self.x.in_order()[..],
            &[Arg::Buffer(&targets), Arg::Buffer(sums.data)],
            &dy.in_order(),
            &[Arg::Buffer(&dx), Arg::Size(self.classes)],
            &self.settings(),
            &[Arg::Size(n)],
        ];
        runtime.launch(&SOURCE, "cross_entropy_vjp", &args.concat(), Grid::items(n))?;
        Ok(dx)
    }

    fn settings<'b>(&self) -> [Arg<'b>; 2] {
        [Arg::F32(self.smoothing as f32), Arg::F32(self.count as f32)]
    }
}
