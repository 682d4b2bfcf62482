//! Files in memory: mapped, or read when asked for.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::io::files::io_error;
use crate::storage::Bytes;

/// How a file's contents come into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// The file is mapped: opening costs nothing, pages are read when they are used and shared with
    /// other programs. **It must not be changed or shortened while it is open**: numbers would change
    /// under their reader, and a page that is gone ends the program. Replacing a file by renaming, as
    /// this crate writes, is fine. On a network file system, read.
    #[default]
    Map,
    /// Each tensor is read when it is asked for.
    Read,
}

/// A file's bytes.
pub(crate) enum Source {
    /// All of them, mapped or read.
    Memory(Bytes),
    /// None yet.
    File(Mutex<File>),
}

impl Source {
    /// The file and its length.
    pub(crate) fn open(path: &Path, access: Access) -> Result<(Source, u64)> {
        let error = |source| io_error(path, source);
        let file = File::open(path).map_err(error)?;
        let about = file.metadata().map_err(error)?;
        if about.is_dir() {
            return Err(Error::data(path.display().to_string(), "this is a folder where a file is needed"));
        }
        // An empty file cannot be mapped.
        if access == Access::Read || about.len() == 0 {
            return Ok((Source::File(Mutex::new(file)), about.len()));
        }
        // SAFETY: the contract that `Access::Map` states: nobody shortens or changes the file while it
        // is open.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(error)?;
        let len = map.len() as u64;
        Ok((Source::Memory(Arc::new(map)), len))
    }

    /// Calls `f` with the bytes of a range, which lies within the file, piece by piece.
    pub(crate) fn read(&self, range: Range<u64>, f: &mut dyn FnMut(&[u8])) -> std::io::Result<()> {
        let mut file = match self {
            Source::Memory(bytes) => {
                f(&(**bytes).as_ref()[range.start as usize..range.end as usize]);
                return Ok(());
            }
            // The position is set before every read.
            Source::File(file) => file.lock().unwrap_or_else(PoisonError::into_inner),
        };
        file.seek(SeekFrom::Start(range.start))?;
        let mut piece = vec![0; (range.end - range.start).min(PIECE) as usize];
        let mut left = range.end - range.start;
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE) as usize];
            file.read_exact(piece)?;
            f(piece);
            left -= piece.len() as u64;
        }
        Ok(())
    }
}

/// Bytes that are read at a time; a multiple of every element's size.
const PIECE: u64 = 1 << 18;
