//! Attention without a matrix of probabilities.

use super::dropout::Mask;
use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats, upload_words};
use crate::error::Result;
use crate::shape::Layout;

static SOURCE: Source = Source { name: "attention.cl", text: include_str!("../../kernels/attention.cl") };

/// Queries, or keys, that a group works for.
const ROWS: usize = 16;

/// The inputs: (B, H, T, d), (B, Hkv, Tk, d), (B, Hkv, Tk, e).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention<'a> {
    pub(crate) q: View<'a>,
    pub(crate) k: View<'a>,
    pub(crate) v: View<'a>,
    pub(crate) scale: f64,
    pub(crate) causal: bool,
    /// For (B, Tk), whether it may be attended to.
    pub(crate) keys: Option<&'a [bool]>,
    pub(crate) mask: Option<Mask>,
}

/// What forward found, and the gradient of its output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found<'a> {
    pub(crate) y: View<'a>,
    pub(crate) lse: View<'a>,
    pub(crate) dy: View<'a>,
}

impl Attention<'_> {
    /// T, B·H, Tk and B·Hkv.
    fn counts(&self) -> [usize; 4] {
        let (q, k) = (self.q.layout.shape(), self.k.layout.shape());
        [q[2], q[0] * q[1], k[2], k[0] * k[1]]
    }

    /// The struct `Sizes` of attention.cl.
    fn sizes(&self) -> [u32; 11] {
        let (q, k, v) = (self.q.layout.shape(), self.k.layout.shape(), self.v.layout.shape());
        let numbers = [q[1], k[1], q[1] / k[1].max(1), q[2], k[2], q[3], v[3]].map(|n| n as u32);
        let [heads, heads_kv, group, t, tk, d, e] = numbers;
        let flags = [self.causal, self.keys.is_some(), self.mask.is_some()].map(u32::from);
        [heads, heads_kv, group, t, tk, d, e, flags[0], flags[1], flags[2], (self.scale as f32).to_bits()]
    }

    /// The keys as bytes, any byte where all may be attended to.
    fn keys(&self) -> Result<ClBuffer> {
        match self.keys {
            Some(keys) => self.q.runtime().upload(&keys.iter().map(|&k| k.into()).collect::<Vec<u8>>()),
            None => upload_words(self.q.runtime(), [0].into_iter()),
        }
    }

    /// The arguments that every kernel here begins with.
    fn args<'b>(&'b self, keys: &'b ClBuffer, sizes: &'b [u32]) -> Vec<Arg<'b>> {
        let nothing = Mask { seed: 0, stream: 0, threshold: 0, scale: 1.0 };
        let rest = [Arg::Buffer(keys), Arg::Words(sizes)];
        let mask = self.mask.unwrap_or(nothing).args();
        [&self.q.by_dimension()[..], &self.k.by_dimension(), &self.v.by_dimension(), &rest, &mask].concat()
    }

    fn grid(&self, places: usize, heads: usize) -> Grid {
        Grid::groups(places.div_ceil(ROWS) * heads)
    }

    /// y, lying as `to` says, and the log-sum-exps (B, H, T).
    pub(crate) fn forward(&self, to: &Layout) -> Result<(ClBuffer, ClBuffer)> {
        let (runtime, [t, heads, ..]) = (self.q.runtime(), self.counts());
        let (y, lse) = (floats(runtime, to.shape().numel())?, floats(runtime, heads * t)?);
        let (keys, sizes) = (self.keys()?, self.sizes());
        let mut args = self.args(&keys, &sizes);
        args.extend([Arg::Buffer(&y), Arg::Layout(to), Arg::Buffer(&lse)]);
        runtime.launch(&SOURCE, "attention", &args, self.grid(t, heads))?;
        Ok((y, lse))
    }

    /// dq, dk and dv, lying as `to` says. All three are made, whoever needs them: they share their work.
    pub(crate) fn vjp(&self, found: Found<'_>, to: [&Layout; 3]) -> Result<[ClBuffer; 3]> {
        let (runtime, [t, heads, tk, heads_kv]) = (self.q.runtime(), self.counts());
        let buffer = |layout: &Layout| floats(runtime, layout.shape().numel());
        let (dq, dk, dv) = (buffer(to[0])?, buffer(to[1])?, buffer(to[2])?);
        let delta = floats(runtime, heads * t)?;
        let (keys, sizes) = (self.keys()?, self.sizes());
        let mut args = self.args(&keys, &sizes);
        args.extend(found.y.by_dimension());
        args.extend(found.dy.by_dimension());
        args.extend([Arg::Buffer(found.lse.data), Arg::Buffer(&delta)]);
        args.extend([Arg::Buffer(&dq), Arg::Layout(to[0])]);
        runtime.launch(&SOURCE, "attention_dq", &args, self.grid(t, heads))?;
        let mut args = self.args(&keys, &sizes);
        args.extend(found.dy.by_dimension());
        args.extend([Arg::Buffer(found.lse.data), Arg::Buffer(&delta)]);
        args.extend([Arg::Buffer(&dk), Arg::Layout(to[1]), Arg::Buffer(&dv), Arg::Layout(to[2])]);
        runtime.launch(&SOURCE, "attention_dkv", &args, self.grid(tk, heads_kv))?;
        Ok([dq, dk, dv])
    }
}
