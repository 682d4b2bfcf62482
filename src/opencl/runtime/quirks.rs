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
    // The largest tile of a matrix product whose group the device runs. It does not change the order of a sum.
    options.push_str(&format!(" -DTHREADS={}", threads(info)));
    options
}

/// A tile of a matrix product: by a square of work-items, of which each makes a square of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) threads: usize,
    pub(crate) each: usize,
}

impl Tile {
    /// How many there are for so many rows, columns and matrices.
    pub(crate) fn groups(self, [rows, cols, batch]: [usize; 3]) -> usize {
        let side = self.threads * self.each;
        rows.div_ceil(side) * cols.div_ceil(side) * batch
    }
}

/// Processors (PoCL, Intel's) run a group's work-items one after another on one core, where the smaller
/// tile stays in the first cache.
fn threads(info: &OpenClInfo) -> usize {
    if info.kind == "CPU" || info.largest_group < 256 { 8 } else { 16 }
}

/// The large tile where that leaves work for all of the device: twice as many groups as it has units.
pub(super) fn tile(info: &OpenClInfo, sizes: [usize; 3]) -> Tile {
    let (threads, large) = (threads(info), 8);
    let fits = sizes[0].min(sizes[1]) >= threads * large;
    let tile = Tile { threads, each: large };
    if fits && tile.groups(sizes) >= 2 * info.compute_units { tile } else { Tile { threads, each: 4 } }
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
        assert_eq!(tile(&info(), [1024, 1024, 1]), Tile { threads: 16, each: 8 });
        // Too few of the large ones for four units; too narrow for them.
        assert_eq!(tile(&info(), [256, 256, 1]), Tile { threads: 16, each: 4 });
        assert_eq!(tile(&info(), [1 << 20, 100, 1]), Tile { threads: 16, each: 4 });
        assert_eq!(tile(&info(), [256, 256, 2]).groups([256, 256, 2]), 8);
        let small = OpenClInfo { largest_group: 128, ..info() };
        assert_eq!(tile(&small, [32, 32, 1]).threads, 8);
        assert_eq!(build_options(&OpenClInfo { kind: "CPU", ..info() }), "-cl-std=CL1.2 -DTHREADS=8");
    }
}
