//! Results on standard output: how they get there, and how numbers and tables look in them.

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use randlora::{Error, Result};

use super::table::wrong;

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

/// An error where a folder must not be written to: it has something in it, and nobody said that this is meant.
pub(crate) fn check_folder(folder: &Path, force: bool) -> Result<()> {
    if folder.exists() && !folder.is_dir() {
        return Err(wrong(folder, "this is a file: name a folder to write to"));
    }
    let filled = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    match filled && !force {
        true => Err(wrong(folder, "the folder exists: name another one, or write into it with `--force`")),
        false => Ok(()),
    }
}

/// The most memory that this process has held, where the system says so.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Seconds of processor time that this process took, over all threads, where the system tells.
pub(crate) fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name, which may hold spaces, in parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    // Linux counts hundredths here, whatever the clock of the machine.
    Some((ticks(14)? + ticks(15)?) as f64 / 100.0)
}

/// 22713216 as `22,713,216`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let first = digits.len() % 3;
    let (head, tail) = digits.split_at(first);
    let groups = tail.as_bytes().chunks(3).map(|group| String::from_utf8_lossy(group).into_owned());
    (!head.is_empty()).then(|| head.to_string()).into_iter().chain(groups).collect::<Vec<_>>().join(",")
}

/// Bytes as MiB, or as they are below a tenth of one.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..=104_857 => format!("{} B", count(bytes)),
        _ => format!("{:.2} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// Lines of cells in columns, two spaces apart. A column whose first cell begins with `>` is put to
/// the right.
pub(crate) fn table(lines: &[Vec<String>]) -> String {
    let right: Vec<bool> = lines.first().into_iter().flatten().map(|cell| cell.starts_with('>')).collect();
    let cell = |cell: &String| cell.trim_start_matches('>').to_string();
    let lines: Vec<Vec<String>> = lines.iter().map(|line| line.iter().map(cell).collect()).collect();
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..right.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).zip(&right).map(|((cell, &width), &right)| match right {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1000, 22_713_216].map(count), ["0", "999", "1,000", "22,713,216"]);
        assert_eq!([0, 104_857, 1 << 20, 3 << 19].map(size), ["0 B", "104,857 B", "1.00 MiB", "1.50 MiB"]);
    }

    #[test]
    fn columns_are_aligned() {
        let line = |cells: [&str; 3]| cells.map(String::from).to_vec();
        let lines = [line(["layer", ">‖λ‖", "type"]), line(["a", "12.5", "F32"]), line(["longer", "7", ""])];
        assert_eq!(table(&lines), "layer    ‖λ‖  type\na       12.5  F32\nlonger     7\n");
        assert_eq!(table(&[]), "");
    }
}
