//! Rows of a table by index, and their gradient.

use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats, upload_words};
use crate::dtype::DType;
use crate::error::Result;

static SOURCE: Source = Source { name: "index.cl", text: include_str!("../../kernels/index.cl") };

/// The rows of `table`, widened to f32, that `ids` name. All must be there.
pub(crate) fn look_up(table: View<'_>, dtype: DType, ids: &[u32]) -> Result<ClBuffer> {
    let (runtime, width) = (table.runtime(), table.layout.shape()[1]);
    let n = ids.len() * width;
    let (y, ids) = (floats(runtime, n)?, upload_words(runtime, ids.iter().copied())?);
    let kernel = match dtype {
        DType::BF16 => "look_up_bf16",
        DType::F16 => "look_up_f16",
        _ => "look_up_f32",
    };
    let args =
        [&table.by_dimension()[..], &[Arg::Buffer(&ids), Arg::Buffer(&y), Arg::Size(width), Arg::Size(n)]];
    runtime.launch(&SOURCE, kernel, &args.concat(), Grid::items(n))?;
    Ok(y)
}

/// A table of `rows` rows: row v is the sum of the rows of `dy` at `places[starts[v]..starts[v + 1]]`.
pub(crate) fn add_rows(
    dy: View<'_>,
    starts: &[usize],
    places: &[usize],
    (rows, width): (usize, usize),
) -> Result<ClBuffer> {
    let (runtime, n) = (dy.runtime(), rows * width);
    let words = |numbers: &[usize]| upload_words(runtime, numbers.iter().map(|&i| i as u32));
    let (table, starts, places) = (floats(runtime, n)?, words(starts)?, words(places)?);
    let args = [
        &dy.in_order()[..],
        &[Arg::Buffer(&starts), Arg::Buffer(&places), Arg::Buffer(&table), Arg::Size(width), Arg::Size(n)],
    ];
    runtime.launch(&SOURCE, "add_rows", &args.concat(), Grid::items(n))?;
    Ok(table)
}

/// x_o,id(o,j,k),k for x (o, d, k) and ids (o, j, k), given d, j and k.
pub(crate) fn gather(x: View<'_>, ids: &[u32], sizes: (usize, usize, usize)) -> Result<ClBuffer> {
    pick("gather", x, ids, sizes, ids.len())
}

/// The gradient of x, given that of the result.
pub(crate) fn gather_vjp(
    dy: View<'_>,
    ids: &[u32],
    sizes: (usize, usize, usize),
    n: usize,
) -> Result<ClBuffer> {
    pick("gather_vjp", dy, ids, sizes, n)
}

fn pick(
    kernel: &'static str,
    from: View<'_>,
    ids: &[u32],
    (d, j, k): (usize, usize, usize),
    n: usize,
) -> Result<ClBuffer> {
    let (runtime, to) = (from.runtime(), floats(from.runtime(), n)?);
    let ids = upload_words(runtime, ids.iter().copied())?;
    let sizes = [d, j, k, n].map(Arg::Size);
    let args = [&from.in_order()[..], &[Arg::Buffer(&ids), Arg::Buffer(&to)], &sizes];
    runtime.launch(&SOURCE, kernel, &args.concat(), Grid::items(n))?;
    Ok(to)
}
