//! The lock on an output's staging directory, which cannot be lost without its holder knowing.
//!
//! A lock belongs to a file and not to its name: whoever deletes the file lets a second merge make
//! and lock another one. So the name is looked at again after locking, and before the commit. Where
//! the file system has no locks, the creation of a file that must not exist stands in; what a killed
//! merge leaves there has to be removed by hand, and the message says so.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::Kept;
use crate::error::{Error, Result};
use crate::storage::local;

const NAME: &str = "lock";
const EXCLUSIVE: &str = "lock.exclusive";
/// How often a lock file may vanish under us before somebody is said to be at it.
const TRIES: usize = 100;

/// Whether a file of the staging directory is a lock.
pub fn is_lock(name: &OsStr) -> bool {
    name == NAME || name == EXCLUSIVE
}

/// A held lock.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: File,
    identity: (u64, u64),
}

impl Lock {
    /// Makes the staging directory of an output, if need be, and locks it.
    ///
    /// # Errors
    /// [`Error::Output`] if another merge has it, or if its name leads elsewhere; [`Error::Io`].
    pub fn take(output: &Path, directory: &Path) -> Result<Self> {
        for _ in 0..TRIES {
            make(output, directory)?;
            let path = directory.join(NAME);
            let file = match open(&path) {
                Ok(file) => file,
                // Whoever held it has just removed the directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(&path, error)),
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(taken(output)),
                Err(TryLockError::Error(_)) => match Self::take_exclusive(output, directory) {
                    Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                        continue;
                    }
                    other => return other,
                },
            }
            let metadata = file.metadata().map_err(|error| Error::io(&path, error))?;
            let lock = Self { identity: local::identity(&metadata), path, file };
            if lock.is_held() {
                return Ok(lock);
            }
        }
        Err(taken(output))
    }

    /// By a file that must not exist yet.
    fn take_exclusive(output: &Path, directory: &Path) -> Result<Self> {
        let path = directory.join(EXCLUSIVE);
        let mut file = match File::options().write(true).create_new(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::output(
                    output,
                    format!(
                        "another merge may be writing there, and its file system has no locks to \
                         tell; if none is, remove {}",
                        path.display()
                    ),
                ));
            }
            Err(error) => return Err(Error::io(&path, error)),
        };
        let failed = |error| Error::io(&path, error);
        if let Err(error) = writeln!(file, "process {}", std::process::id()) {
            let _ = fs::remove_file(&path);
            return Err(failed(error));
        }
        let identity = local::identity(&file.metadata().map_err(failed)?);
        Ok(Self { path, file, identity })
    }

    /// Whether the name still leads to the file that is locked.
    pub fn is_held(&self) -> bool {
        fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| metadata.is_file() && local::identity(&metadata) == self.identity)
    }

    /// Gives the lock up and removes its file. A file that cannot be removed locks nothing, but where
    /// there are no locks; then it says what it is.
    pub fn release(self) {
        if self.is_held() {
            let directory = self.path.parent().unwrap_or(Path::new(""));
            // Where there are no locks, both files are this merge's.
            for name in [NAME, EXCLUSIVE] {
                let _ = fs::remove_file(directory.join(name));
            }
        }
        drop(self.file);
    }

    /// Removes all that is in the staging directory but the lock, the journal of a commit first,
    /// unless the lock was lost: then it is somebody else's. Finished models that are kept may stay.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn clear(&self, directory: &Path, kept: Kept) -> io::Result<()> {
        if !self.is_held() {
            return Ok(());
        }
        match fs::remove_file(directory.join(super::commit::JOURNAL)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        super::clear(directory, kept).map(drop)
    }

    /// [`Lock::clear`], and then the directory itself with the lock, if nothing is left in it.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn remove(self, directory: &Path, kept: Kept) -> io::Result<()> {
        if !self.is_held() {
            return Ok(());
        }
        let cleared = self.clear(directory, kept);
        self.release();
        cleared?;
        match fs::remove_dir(directory) {
            // Somebody has begun to wait for it meanwhile, or a model is kept.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

fn taken(output: &Path) -> Error {
    Error::output(output, "another merge is writing there at this moment")
}

/// Makes the output and the staging directory in it; a link of its name could lead anywhere.
fn make(output: &Path, directory: &Path) -> Result<()> {
    let failed = |error| Error::io(directory, error);
    // Another merge may remove at this moment what it has made.
    fs::create_dir_all(output).map_err(|error| Error::io(output, error))?;
    match fs::create_dir(directory) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    match fs::symlink_metadata(directory) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(metadata) => {
            let what = if metadata.is_symlink() { "a link" } else { local::kind(&metadata) };
            Err(Error::output(
                directory,
                format!("is {what} where merges are prepared; remove it or give another output"),
            ))
        }
        // Removed at this moment: the next try makes it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

/// Opens the lock file without following a link and without emptying it.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    let file = options.open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::AlreadyExists.into()) }
}
