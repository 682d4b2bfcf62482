//! Where devices and drivers differ, in one place.
//!
//! Kernels use OpenCL C 1.2 without extensions, and count on three things: groups of 64 work-items that
//! meet at barriers, 16 KiB of local memory, and arithmetic that keeps infinities and NaN.

use super::GROUP;
use super::info::OpenClInfo;
use crate::error::{Error, Result};

/// Held while devices are asked for: PoCL makes them at the first question, and hands out what is half made to
/// a second thread that asks meanwhile.
#[cfg(feature = "opencl")]
pub(super) static FIRST_QUESTION: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Local memory that the kernels use at most.
const LOCAL_MEMORY: usize = 16 << 10;

/// An error where a device lacks what the kernels need.
pub(super) fn check(info: &OpenClInfo) -> Result<()> {
    let refuse = |why: String| {
        Err(Error::opencl("open", format!("{} cannot be used: {why}; choose another device", info.name)))
    };
    // Apple's driver for processors runs groups with barriers one work-item at a time, whatever it says.
    if info.platform.contains("Apple") && info.kind == "CPU" {
        return refuse("Apple's OpenCL for processors has no barriers".into());
    }
    if info.largest_group < GROUP {
        return refuse(format!("it runs groups of {} work-items, {GROUP} are needed", info.largest_group));
    }
    if info.local_memory < LOCAL_MEMORY {
        return refuse(format!(
            "it has {} bytes of local memory, {LOCAL_MEMORY} are needed",
            info.local_memory
        ));
    }
    Ok(())
}

/// Whether a code may say that there is no memory. CL_OUT_OF_RESOURCES is what NVIDIA's driver says then, and
/// also when a kernel has failed; only whether the queue goes on tells.
pub(super) fn is_want_of_memory(code: i32) -> bool {
    const MEM_OBJECT_ALLOCATION_FAILURE: i32 = -4;
    const OUT_OF_RESOURCES: i32 = -5;
    const OUT_OF_HOST_MEMORY: i32 = -6;
    [MEM_OBJECT_ALLOCATION_FAILURE, OUT_OF_RESOURCES, OUT_OF_HOST_MEMORY].contains(&code)
}

/// Whether a code says that nothing goes on a device any more: what the standard has, what NVIDIA's driver says
/// of every call after a kernel has failed (an invalid context or queue), and its own code for a place in
/// memory that is not a buffer's.
pub(super) fn is_loss(code: i32) -> bool {
    const DEVICE_NOT_AVAILABLE: i32 = -2;
    const INVALID_CONTEXT: i32 = -34;
    const INVALID_COMMAND_QUEUE: i32 = -36;
    const NVIDIA_ILLEGAL_ACCESS: i32 = -9999;
    [DEVICE_NOT_AVAILABLE, INVALID_CONTEXT, INVALID_COMMAND_QUEUE, NVIDIA_ILLEGAL_ACCESS].contains(&code)
}

/// Whether copies go through pinned memory: where the driver would copy to such memory of its own first.
pub(super) fn pins(info: &OpenClInfo) -> bool {
    !info.shares_memory
}

/// Groups in a grid, all in one dimension: CUDA's other two end at 65,535.
pub(super) const MOST_GROUPS: usize = i32::MAX as usize;

/// How programs are built for a device.
///
/// Never with `-cl-fast-relaxed-math` or one of its parts: a mask is −∞, and a NaN has to be seen.
pub(super) fn build_options(info: &OpenClInfo) -> String {
    let mut options = String::from("-cl-std=CL1.2");
    let shape = shape(info);
    options.push_str(&format!(" -DTHREADS={} -DWIDTH={}", shape.threads, shape.width));
    options
}

/// A tile of a matrix product, made by a square of work-items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) threads: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Whether it is the large one of the device's two.
    pub(crate) large: bool,
}

impl Tile {
    /// How many there are for so many rows, columns and matrices.
    pub(crate) fn groups(self, [rows, cols, batch]: [usize; 3]) -> usize {
        rows.div_ceil(self.rows) * cols.div_ceil(self.columns) * batch
    }
}

/// What gemm.cl is built for.
struct TileShape {
    threads: usize,
    /// Columns in a vector.
    width: usize,
    /// Rows and vectors of columns that a work-item makes in a large tile. In a small one it makes 4 and 1.
    large: (usize, usize),
}

/// Processors (PoCL, Intel's) run a group's work-items one after another on one core: long vectors do there what
/// many work-items do elsewhere, and a small tile stays in the first cache.
fn shape(info: &OpenClInfo) -> TileShape {
    match (info.kind, info.largest_group) {
        ("CPU", _) => TileShape { threads: 8, width: 16, large: (8, 1) },
        (_, ..256) => TileShape { threads: 8, width: 4, large: (8, 2) },
        _ => TileShape { threads: 16, width: 4, large: (8, 2) },
    }
}

/// The large tile where that leaves work for all of the device: twice as many groups as it has units.
pub(super) fn tile(info: &OpenClInfo, sizes: [usize; 3]) -> Tile {
    let TileShape { threads, width, large: (each, vectors) } = shape(info);
    let of = |each, vectors, large| Tile {
        threads,
        rows: threads * each,
        columns: threads * width * vectors,
        large,
    };
    let large = of(each, vectors, true);
    let fits = sizes[0] >= large.rows && sizes[1] >= large.columns;
    if fits && large.groups(sizes) >= 2 * info.compute_units { large } else { of(4, 1, false) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> OpenClInfo {
        OpenClInfo {
            platform: "A platform".into(),
            name: "A card".into(),
            vendor: String::new(),
            version: "OpenCL 1.2".into(),
            driver: String::new(),
            kind: "GPU",
            memory: 1 << 30,
            shares_memory: false,
            largest_buffer: 1 << 28,
            local_memory: 32 << 10,
            largest_group: 256,
            compute_units: 4,
            extensions: vec!["cl_khr_fp64".into()],
        }
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        assert!(check(&info()).is_ok() && info().has_f64() && !info().has_f16());
        let small = check(&OpenClInfo { largest_group: 1, ..info() }).unwrap_err().to_string();
        assert!(small.contains("groups of 1 work-items, 64 are needed"), "{small}");
        assert!(check(&OpenClInfo { local_memory: 1 << 10, ..info() }).is_err());
        assert!(check(&OpenClInfo { platform: "Apple".into(), kind: "CPU", ..info() }).is_err());
    }

    #[test]
    fn tiles_follow_the_device() {
        let side = |info: &OpenClInfo, sizes| {
            let tile = tile(info, sizes);
            (tile.threads, tile.rows, tile.columns, tile.large)
        };
        assert_eq!(side(&info(), [1024, 1024, 1]), (16, 128, 128, true));
        // Too few of the large ones for four units; too narrow for them.
        assert_eq!(side(&info(), [256, 256, 1]), (16, 64, 64, false));
        assert_eq!(side(&info(), [1 << 20, 100, 1]), (16, 64, 64, false));
        assert_eq!(tile(&info(), [256, 256, 2]).groups([256, 256, 2]), 8);
        let small = OpenClInfo { largest_group: 128, ..info() };
        assert_eq!(side(&small, [32, 32, 1]), (8, 32, 32, false));
        let cpu = OpenClInfo { kind: "CPU", ..info() };
        assert_eq!(side(&cpu, [512, 512, 1]), (8, 64, 128, true));
        assert_eq!(build_options(&cpu), "-cl-std=CL1.2 -DTHREADS=8 -DWIDTH=16");
    }
}
