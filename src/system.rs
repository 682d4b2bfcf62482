//! What not every system has: on wasm32-unknown-unknown there is neither a clock nor a process, and
//! the standard library panics where it is asked for one. The library asks here.

use std::time::Instant;

const BARE: bool = cfg!(all(target_family = "wasm", target_os = "unknown"));

/// The time, where there is a clock.
pub(crate) fn now() -> Option<Instant> {
    (!BARE).then(Instant::now)
}

/// The number of this process; 0 where there are none.
pub(crate) fn process() -> u32 {
    if BARE { 0 } else { std::process::id() }
}
