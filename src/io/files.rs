//! Writing files whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::system;

pub(crate) fn io_error(path: &Path, source: io::Error) -> Error {
    Error::Io { path: path.to_path_buf(), source }
}

/// Writes a file by way of a temporary one beside it: whoever reads the path sees the old contents or
/// all of the new ones, also where the disk fills up or the program ends on the way. A file that is
/// mapped may be replaced.
///
/// # Errors
/// [`Error::Io`], also for a path that is there and no file; nothing is left behind then.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let refuse = |kind, message| Err(io_error(path, io::Error::new(kind, message)));
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => {
            return refuse(io::ErrorKind::IsADirectory, "this is a folder, not a file");
        }
        // Renaming would put the file in its place: /dev/null would be gone.
        Ok(there) if !there.is_file() => {
            return refuse(io::ErrorKind::InvalidInput, "this is a device or a pipe: name a file");
        }
        _ => {}
    }
    let temporary = beside(path);
    let written = fill(&temporary, write).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
        io_error(path, source)
    })
}

fn fill(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(path)?);
    write(&mut writer)?;
    writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// A name in the same folder, so that renaming stays within one file system.
fn beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.tmp", system::process()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::tests::Folder;

    #[test]
    fn whole_or_not_at_all() {
        let folder = Folder::new("write_whole");
        let path = folder.path("file");
        write_whole(&path, |w| w.write_all(b"old")).unwrap();
        let error = write_whole(&path, |w| {
            w.write_all(b"half")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(error.unwrap_err().to_string(), format!("{}: the disk is full", path.display()));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write_whole(&path, |w| w.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_in_the_way_and_a_folder_that_is_not_there() {
        let folder = Folder::new("write_whole_folder");
        assert!(matches!(write_whole(&folder.path(""), |_| Ok(())), Err(Error::Io { .. })));
        assert!(matches!(write_whole(&folder.path("no/file"), |_| Ok(())), Err(Error::Io { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_not_replaced_by_one() {
        use std::os::unix::fs::FileTypeExt;
        let folder = Folder::new("write_whole_socket");
        let path = folder.path("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = write_whole(&path, |w| w.write_all(b"new")).unwrap_err().to_string();
        assert_eq!(error, format!("{}: this is a device or a pipe: name a file", path.display()));
        assert!(fs::metadata(&path).unwrap().file_type().is_socket());
        assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 1);
    }
}
