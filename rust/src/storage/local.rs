//! Opening files that others may change, positioned reads and writes, and copies that stay in the
//! kernel.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

pub use std::fs::{File, Metadata};

use crate::error::{Error, Result};

/// What tells that a path still leads to the same file, and that nobody has written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Bytes of the file.
    pub length: u64,
    /// Nanoseconds from 1970 to the last change of its content.
    pub modified: u128,
    /// Which file it is: device and inode, or zeros where the system has none.
    pub identity: (u64, u64),
}

impl Stamp {
    /// Of a file with this metadata.
    pub fn of(metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok();
        let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Self {
            length: metadata.len(),
            modified: since.map_or(0, |since| since.as_nanos()),
            identity: identity(metadata),
        }
    }

    /// Of several taken together, in their order, as far as it is not their length.
    pub fn of_all(stamps: impl Iterator<Item = Self>) -> Self {
        let none = Self { length: 0, modified: 0, identity: (0, 0) };
        stamps.fold(none, |all, one| {
            let ((device, file), (own_device, own_file)) = (all.identity, one.identity);
            let identity = (device ^ own_device, file.rotate_left(7) ^ own_file);
            Self { length: 0, modified: all.modified.max(one.modified), identity }
        })
    }
}

/// Device and inode, which two names of one file share.
#[cfg(unix)]
pub fn identity(metadata: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// Device and inode, which two names of one file share; not known here.
#[cfg(not(unix))]
pub fn identity(_metadata: &Metadata) -> (u64, u64) {
    (0, 0)
}

/// Opens a plain file for reading, links followed. A pipe, a socket or a device would make the
/// reader wait or do something, so what is there is looked at before it is opened and after.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened, [`Error::Checkpoint`] if it is something else.
pub fn open(path: &Path) -> Result<(File, Metadata)> {
    let failed = |error| Error::io(path, error);
    let plain = |metadata: &Metadata| {
        if metadata.is_file() {
            return Ok(());
        }
        Err(Error::checkpoint(path, format!("is {}; a plain file is needed here", kind(metadata))))
    };
    plain(&fs::metadata(path).map_err(failed)?)?;
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // A pipe that has come meanwhile does not wait for its writer. Plain files do not care.
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    plain(&metadata)?;
    Ok((file, metadata))
}

/// The permissions of a file for one that is made from it: who may read, write and execute, and none
/// of the bits that let a program act as somebody else.
pub fn permissions(metadata: &Metadata) -> fs::Permissions {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::Permissions::from_mode(metadata.permissions().mode() & 0o777)
    }
    #[cfg(not(unix))]
    metadata.permissions()
}

/// The rest of an open file.
///
/// # Errors
/// Those of the operating system.
pub fn read_whole(file: &mut File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    Ok(content)
}

/// Lets this process have that many files open beside those of others in it: raises its limit to
/// the system's hard one where it is too low. Only a hint: opening reports real errors.
pub fn allow_open(count: usize) {
    /// What a process has open otherwise: libraries, pipes, the interpreter's files.
    const OTHERS: u64 = 128;
    #[cfg(unix)]
    {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let mut limit = getrlimit(Resource::Nofile);
        let needed = count as u64 + OTHERS;
        if limit.current.is_some_and(|current| current < needed) {
            limit.current = limit.maximum.or(Some(needed));
            let _ = setrlimit(Resource::Nofile, limit);
        }
    }
    #[cfg(not(unix))]
    let _ = count;
}

/// What a path that is no plain file is, in words.
pub fn kind(metadata: &Metadata) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = metadata.file_type();
        if kind.is_fifo() {
            return "a pipe";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_block_device() || kind.is_char_device() {
            return "a device";
        }
    }
    match metadata {
        metadata if metadata.is_dir() => "a directory",
        metadata if metadata.is_file() => "a plain file",
        _ => "no plain file",
    }
}

/// What a path leads to; `None` only where nothing has that name. A link that leads nowhere, or
/// something that may not be looked at, is there and is an error.
///
/// # Errors
/// [`Error::Io`], or [`Error::Checkpoint`] for a link that leads nowhere.
pub fn find(path: &Path) -> Result<Option<Metadata>> {
    let own = match fs::symlink_metadata(path) {
        Ok(own) => own,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    if !own.is_symlink() {
        return Ok(Some(own));
    }
    fs::metadata(path).map(Some).map_err(|error| {
        let target = fs::read_link(path).unwrap_or_default();
        match error.kind() {
            io::ErrorKind::NotFound => Error::checkpoint(
                path,
                format!("is a link to {}, which is not there; fetch it again", target.display()),
            ),
            _ => Error::io(path, error),
        }
    })
}

/// Makes a directory and those above it, as far as they are not there.
///
/// # Errors
/// [`Error::Io`].
pub fn create_directories(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).map_err(|error| Error::io(directory, error))
}

/// Makes an empty file for reading and writing. What has its name is removed first, so that nothing
/// is written through a link.
///
/// # Errors
/// [`Error::Io`].
pub fn create(path: &Path) -> Result<File> {
    let failed = |error| Error::io(path, error);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    File::options().read(true).write(true).create_new(true).open(path).map_err(failed)
}

/// The same with the permissions of the file that it is made from, if there is one.
///
/// # Errors
/// As [`create`].
pub fn create_like(path: &Path, like: Option<&File>) -> Result<File> {
    let file = create(path)?;
    if let Some(metadata) = like.and_then(|like| like.metadata().ok()) {
        // Some file systems have no permissions to set.
        let _ = file.set_permissions(permissions(&metadata));
    }
    Ok(file)
}

/// Opens a file for reading and writing, with what is in it; an empty one where there is none.
///
/// # Errors
/// [`Error::Io`].
pub fn open_or_create(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(|error| Error::io(path, error))
}

/// Brings what was written of a file to the disk.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_file(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| Error::io(path, error))
}

/// Writes a small file, whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write_small(path: &Path, content: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let failed = |error| Error::io(&partial, error);
    let mut file = create(&partial)?;
    let written = file
        .write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(failed)
        .and_then(|()| rename(&partial, path));
    if written.is_err() {
        remove(&partial);
    }
    written
}

/// Removes a file that is of no use any more, if that can be done.
pub fn remove(path: &Path) {
    // Whoever made it is about to say what went wrong.
    let _ = fs::remove_file(path);
}

/// Removes a directory that was made for a time, with all that is in it, if that can be done.
pub fn remove_all(directory: &Path) {
    let _ = fs::remove_dir_all(directory);
}

/// Gives a file another name, in the place of what has that name.
///
/// # Errors
/// [`Error::Io`].
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|error| Error::io(to, error))
}

/// What the system says of a path that is not there.
pub fn absence_of(path: &Path) -> io::Error {
    fs::metadata(path).err().unwrap_or_else(|| io::ErrorKind::NotFound.into())
}

/// What is known of a path, links followed.
///
/// # Errors
/// Those of the operating system.
pub fn metadata(path: &Path) -> io::Result<Metadata> {
    fs::metadata(path)
}

/// The paths of a directory's entries, in the system's order.
///
/// # Errors
/// [`Error::Io`] if it cannot be listed.
pub fn paths_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io(directory, error);
    let entries = fs::read_dir(directory).map_err(failed)?;
    entries.map(|entry| Ok(entry.map_err(failed)?.path())).collect()
}

/// The same; `None` if nobody may look into it.
///
/// # Errors
/// [`Error::Io`] if it cannot be listed for another reason.
pub fn paths_in_if_allowed(directory: &Path) -> Result<Option<Vec<PathBuf>>> {
    match paths_in(directory) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            Ok(None)
        }
        paths => paths.map(Some),
    }
}

/// An entry of a directory, no link followed.
#[derive(Debug)]
pub struct Entry {
    /// Its path.
    pub path: PathBuf,
    /// Its name.
    pub name: OsString,
    /// Whether it is a directory itself.
    pub is_directory: bool,
}

/// The entries of a directory, in the system's order.
///
/// # Errors
/// [`Error::Io`] if it cannot be listed.
pub fn entries_in(directory: &Path) -> Result<Vec<Entry>> {
    let failed = |error| Error::io(directory, error);
    let entries = fs::read_dir(directory).map_err(failed)?;
    let look = |entry: io::Result<fs::DirEntry>| {
        let entry = entry?;
        let is_directory = entry.file_type()?.is_dir();
        Ok(Entry { path: entry.path(), name: entry.file_name(), is_directory })
    };
    entries.map(|entry| look(entry).map_err(failed)).collect()
}

/// Whether a path leads to a directory.
pub fn is_directory(path: &Path) -> bool {
    path.is_dir()
}

/// A path with every link resolved.
///
/// # Errors
/// [`Error::Io`], also if nothing is there.
pub fn real_path(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| Error::io(path, error))
}

/// What is known of an open file.
///
/// # Errors
/// Those of the operating system.
pub fn metadata_of(file: &File) -> io::Result<Metadata> {
    file.metadata()
}

/// Makes a directory and those above it, where they are not there.
///
/// # Errors
/// [`Error::Io`].
pub fn create_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| Error::io(path, error))
}

/// Writes a file whole or not at all: under the name `partial` beside it, which is nobody else's, and
/// then under its own.
///
/// # Errors
/// [`Error::Io`].
pub fn write_whole(path: &Path, partial: &Path, content: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        // What a killed process left under that name; never through a link.
        match fs::remove_file(partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        File::options().write(true).create_new(true).open(partial)?.write_all(content)?;
        fs::rename(partial, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(partial);
        Error::io(path, error)
    })
}

/// All of a small plain file, and what it was when it was opened.
///
/// # Errors
/// As [`open`], and [`Error::Io`].
pub fn read_small(path: &Path) -> Result<(Vec<u8>, Stamp)> {
    let (mut file, metadata) = open(path)?;
    let text = read_whole(&mut file).map_err(|error| Error::io(path, error))?;
    Ok((text, Stamp::of(&metadata)))
}

/// Fills `buffer` from that offset.
///
/// # Errors
/// Those of the operating system; `UnexpectedEof` if the file has become shorter.
#[cfg(unix)]
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// Writes all of `bytes` at that offset.
///
/// # Errors
/// Those of the operating system.
#[cfg(unix)]
pub fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Fills `buffer` from that offset.
///
/// # Errors
/// Those of the operating system; `UnexpectedEof` if the file has become shorter.
#[cfg(windows)]
pub fn read_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}

/// Writes all of `bytes` at that offset.
///
/// # Errors
/// Those of the operating system.
#[cfg(windows)]
pub fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        bytes = &bytes[count..];
        offset += count as u64;
    }
    Ok(())
}

/// Which of two files a copy failed at.
#[derive(Debug)]
pub enum CopyError {
    /// The one that was read.
    Read(io::Error),
    /// The one that was written.
    Write(io::Error),
}

/// Copies a range of one file to an offset of another: inside the kernel where it can, which
/// shares blocks on file systems that know how, and through `buffer` where it cannot. On ext4, which
/// shares none, the kernel goes through pipes page by page, and the buffer is faster.
///
/// # Errors
/// Those of the operating system, with the file at fault; `UnexpectedEof` if the source has become
/// shorter.
pub fn copy_range(
    source: &File,
    range: Range<u64>,
    target: &File,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), CopyError> {
    let (mut range, mut offset) = (range, offset);
    #[cfg(target_os = "linux")]
    if !is_on_ext4(target) {
        copy_in_kernel(source, &mut range, target, &mut offset);
    }
    while range.start < range.end {
        let count = buffer.len().min((range.end - range.start) as usize);
        read_at(source, &mut buffer[..count], range.start).map_err(CopyError::Read)?;
        write_at(target, &buffer[..count], offset).map_err(CopyError::Write)?;
        range.start += count as u64;
        offset += count as u64;
    }
    Ok(())
}

/// Copies as far as the kernel will, and moves range and offset past what was done. Whatever it
/// refuses (another file system, no support, an odd file) is left to the buffer, which meets real
/// errors itself.
#[cfg(target_os = "linux")]
fn copy_in_kernel(source: &File, range: &mut Range<u64>, target: &File, offset: &mut u64) {
    while range.start < range.end {
        let (mut from, mut to) = (range.start, *offset);
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), length) {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                range.start += count as u64;
                *offset += count as u64;
            }
        }
    }
}

#[cfg(target_os = "linux")]
fn is_on_ext4(file: &File) -> bool {
    /// Of ext2 and ext3, too, which ext4 has taken over.
    const EXT4: u64 = 0xef53;
    rustix::fs::fstatfs(file).is_ok_and(|status| status.f_type as u64 == EXT4)
}

/// Sets blocks aside for a file of that many bytes, where that makes writing it cheaper: on ext4,
/// which otherwise accounts for each block as it is written. Elsewhere it costs more (tmpfs makes
/// all pages at once) or takes what may come to be shared with another file (XFS, Btrfs). Only a
/// hint; a full disk shows when it is written.
pub fn allocate(file: &File, bytes: u64) {
    #[cfg(target_os = "linux")]
    if bytes > 0 && is_on_ext4(file) {
        let _ = rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, bytes);
}

/// Asks the system to begin writing a range to the disk, without waiting for it, so that the sync
/// at the end finds little left to do and dirty pages never pile up. Only a hint: nothing is
/// promised, and where there is no such call nothing happens.
pub fn begin_writing(file: &File, range: Range<u64>) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let (Ok(start), Ok(length)) =
            (i64::try_from(range.start), i64::try_from(range.end - range.start))
        else {
            return;
        };
        // SAFETY: the descriptor is open for as long as `file` is borrowed, and the call touches
        // no memory of this process. Its failure changes nothing: the sync at the end reports
        // real errors.
        unsafe {
            libc::sync_file_range(file.as_raw_fd(), start, length, libc::SYNC_FILE_RANGE_WRITE)
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, range);
}

#[cfg(test)]
mod tests;
