//! Results on standard output.

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use randlora::{Error, Result};

/// Prints a line. Where the reader has gone, as `head` does, the program ends in peace.
///
/// # Errors
/// [`Error::Io`] where standard output cannot be written, a full disk say.
pub(crate) fn say(line: impl Display) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{line}") {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(source) => Err(Error::Io { path: PathBuf::from("standard output"), source }),
        Ok(()) => Ok(()),
    }
}

/// The most memory that this process has held, where the system says so.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
