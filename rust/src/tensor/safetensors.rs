//! One safetensors file: its checked header, and its data in positioned reads.
//!
//! Nothing is mapped. Files belong to others, who may truncate them at any time (saving again does),
//! and a map's missing page kills the process; a read that finds less than the header promised is an
//! error like any other. What was written to in place is found by [`SafetensorsFile::check_unchanged`]
//! once everything was read.

mod header;

use std::fs::{self, File, Metadata};
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};

pub use header::{Header, TensorInfo};

use crate::adapter::hexadecimal;
use crate::error::{Error, Owner, Result};
use crate::storage::local::{self, Stamp, read_at};
use header::{PREFIX, Parsed, Positions};

/// Bytes that are looked at together where a whole tensor or file goes by: small enough to stay in
/// the second-level cache beside what they are held against.
const CHUNK: usize = 256 << 10;

/// An opened file: the checked header, and the descriptor from which its data is read.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    owner: Owner,
    file: File,
    stamp: Stamp,
    /// Length prefix and header as they were read.
    beginning: Vec<u8>,
    header: Header,
    positions: Positions,
}

impl SafetensorsFile {
    /// Opens and checks a file of a model.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::Checkpoint`] if it is not sound.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_of(path, Owner::Checkpoint)
    }

    /// Opens and checks an adapter's weights.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be opened, [`Error::Adapter`] if they are not sound.
    pub fn open_adapter(path: &Path) -> Result<Self> {
        Self::open_of(path, Owner::Adapter)
    }

    fn open_of(path: &Path, owner: Owner) -> Result<Self> {
        let (file, metadata) = local::open(path).map_err(|error| error.of(owner))?;
        let metadata = settled(&file, metadata).map_err(|error| owner.unread(path, error))?;
        let broken = |message: String| owner.broken(path, message);
        let (stamp, size) = (Stamp::of(&metadata), metadata.len());
        if size < PREFIX {
            return Err(broken(format!(
                "is truncated: {size} bytes are too few for a safetensors file; fetch it again"
            )));
        }
        let failed = |error| owner.unread(path, error);
        let mut beginning = vec![0; PREFIX as usize];
        read_at(&file, &mut beginning, 0).map_err(failed)?;
        let length = header::length(&beginning, size).map_err(broken)?;
        beginning.resize((PREFIX + length) as usize, 0);
        read_at(&file, &mut beginning[PREFIX as usize..], PREFIX).map_err(failed)?;
        let Parsed { header, positions } = header::parse(&beginning, size).map_err(broken)?;
        Ok(Self { path: path.to_path_buf(), owner, file, stamp, beginning, header, positions })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for copies in the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What the file was when it was opened.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Bytes of the whole file.
    pub fn size(&self) -> u64 {
        self.stamp.length
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes before the data: length prefix and header.
    pub fn data_start(&self) -> u64 {
        self.beginning.len() as u64
    }

    /// Length prefix and header as they stand in the file.
    pub fn header_bytes(&self) -> &[u8] {
        &self.beginning
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let position = self.positions.find(name, &self.header.tensors)?;
        Some(&self.header.tensors[position])
    }

    /// A tensor's bytes.
    ///
    /// # Errors
    /// That the file changed, or [`Error::Io`].
    pub fn read(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        self.read_range(tensor, 0..tensor.bytes())
    }

    /// Some of a tensor's bytes, counted from its first.
    ///
    /// # Errors
    /// As [`SafetensorsFile::read`].
    pub fn read_range(&self, tensor: &TensorInfo, bytes: Range<u64>) -> Result<Vec<u8>> {
        let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
        self.read_into(tensor, bytes.start, &mut buffer)?;
        Ok(buffer)
    }

    /// Fills a buffer with a tensor's bytes from `offset` on.
    ///
    /// # Errors
    /// As [`SafetensorsFile::read`].
    pub fn read_into(&self, tensor: &TensorInfo, offset: u64, buffer: &mut [u8]) -> Result<()> {
        debug_assert!(offset + buffer.len() as u64 <= tensor.bytes(), "within the tensor");
        self.read_raw(self.data_start() + tensor.range.start + offset, buffer)
    }

    /// Fills a buffer with the file's bytes from `offset` on.
    ///
    /// # Errors
    /// As [`SafetensorsFile::read`].
    pub fn read_raw(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        read_at(&self.file, buffer, offset).map_err(|error| self.unread(error))
    }

    /// Hands a tensor's bytes on in order, run after run with where each begins, until nobody wants
    /// more. All runs but the last are of one length that is a multiple of any element's.
    ///
    /// # Errors
    /// As [`SafetensorsFile::read`].
    pub fn for_each_chunk(
        &self,
        tensor: &TensorInfo,
        each: &mut dyn FnMut(u64, &[u8]) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK.min(tensor.bytes() as usize)];
        for start in (0..tensor.bytes()).step_by(CHUNK) {
            let chunk = &mut buffer[..CHUNK.min((tensor.bytes() - start) as usize)];
            self.read_into(tensor, start, chunk)?;
            if each(start, chunk).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// The SHA-256 of the open file, in hexadecimal: of what was opened, whatever its path leads to
    /// by now.
    ///
    /// # Errors
    /// As [`SafetensorsFile::read`].
    pub fn sha256(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; CHUNK.min(self.size() as usize)];
        for start in (0..self.size()).step_by(CHUNK) {
            let chunk = &mut buffer[..CHUNK.min((self.size() - start) as usize)];
            self.read_raw(start, chunk)?;
            hasher.update(chunk);
        }
        Ok(hexadecimal(&hasher.finalize()))
    }

    /// Looks again at the open file and at what its path leads to: an error if either is not what
    /// was opened, in length, time of change or identity.
    ///
    /// # Errors
    /// That the file changed, or [`Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(|error| Error::io(&self.path, error))?;
        if Stamp::of(&metadata) != self.stamp {
            return Err(self.changed());
        }
        check_path(self.owner, &self.path, self.stamp)
    }

    /// The error for a file that is no longer what was opened.
    pub fn changed(&self) -> Error {
        self.owner.changed(&self.path)
    }

    /// The error for a read that failed.
    pub(crate) fn unread(&self, error: io::Error) -> Error {
        self.owner.unread(&self.path, error)
    }
}

/// Longer than the steps in which file systems count time.
const TICK: Duration = Duration::from_millis(20);
/// How many steps to wait for a file that is being written.
const PATIENCE: usize = 5;

/// What is known of an open file once its time of change is so long ago that the next change will
/// have another one. A file that somebody goes on writing is taken as it is, and found changed later.
fn settled(file: &File, mut metadata: Metadata) -> io::Result<Metadata> {
    for _ in 0..PATIENCE {
        let age = metadata.modified().ok().and_then(|time| time.elapsed().ok());
        // A clock that runs differently tells nothing.
        let Some(rest) = age.and_then(|age| TICK.checked_sub(age)) else { break };
        thread::sleep(rest);
        metadata = file.metadata()?;
    }
    Ok(metadata)
}

/// Looks again at what a path leads to: an error if it is not what had that stamp.
///
/// # Errors
/// That the file changed, or [`Error::Io`].
pub(crate) fn check_path(owner: Owner, path: &Path, stamp: Stamp) -> Result<()> {
    match fs::metadata(path) {
        Ok(metadata) if Stamp::of(&metadata) == stamp => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Err(owner.changed(path)),
    }
}

/// Whether two tensors hold the same bytes, which are looked at a run at a time.
///
/// # Errors
/// That one of the files changed, or [`Error::Io`].
pub fn same_bytes(
    (left_file, left): (&SafetensorsFile, &TensorInfo),
    (right_file, right): (&SafetensorsFile, &TensorInfo),
) -> Result<bool> {
    if left.bytes() != right.bytes() {
        return Ok(false);
    }
    let (mut same, mut failure) = (true, None);
    let mut buffer = Vec::new();
    left_file.for_each_chunk(left, &mut |start, bytes| {
        buffer.resize(bytes.len(), 0);
        match right_file.read_into(right, start, &mut buffer) {
            Ok(()) => same = buffer == bytes,
            Err(error) => failure = Some(error),
        }
        if same && failure.is_none() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    failure.map_or(Ok(same), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{ramp, write};
    use crate::tensor::dtype::Dtype;

    fn tensors() -> Vec<(&'static str, Dtype, &'static [u64], Vec<f32>)> {
        let shape: &[u64] = &[300, 400];
        vec![
            ("x", Dtype::F32, shape, ramp(120_000, 1)),
            ("y", Dtype::F32, shape, ramp(120_000, 1)),
            ("z", Dtype::F32, shape, ramp(120_000, 2)),
        ]
    }

    #[test]
    fn tensors_are_read_whole_in_parts_and_in_runs() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("one.safetensors");
        write(&path, &tensors());
        let file = SafetensorsFile::open(&path).expect("sound");
        let content = fs::read(&path).expect("read");
        assert_eq!(file.header_bytes(), &content[..file.data_start() as usize]);
        assert_eq!(file.size(), content.len() as u64);
        let of = |name| file.tensor(name).expect("there");
        let start = (file.data_start() + of("z").range.start) as usize;
        assert!(file.read(of("z")).expect("read") == content[start..start + 480_000]);
        assert!(file.read_range(of("z"), 9..77).expect("read") == content[start + 9..start + 77]);
        let mut whole = Vec::new();
        let mut runs = 0;
        file.for_each_chunk(of("z"), &mut |at, bytes| {
            assert_eq!(at as usize, whole.len());
            whole.extend_from_slice(bytes);
            runs += 1;
            ControlFlow::Continue(())
        })
        .expect("read");
        assert!(runs > 1 && whole == content[start..start + 480_000]);
        assert!(same_bytes((&file, of("x")), (&file, of("y"))).expect("read"));
        assert!(!same_bytes((&file, of("x")), (&file, of("z"))).expect("read"));
        assert_eq!(file.sha256().expect("read"), crate::adapter::sha256_of_bytes(&content));
        file.check_unchanged().expect("nobody wrote to it");
    }

    #[test]
    fn a_file_that_is_not_what_was_opened_is_one_error() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("one.safetensors");
        let sentence = "changed while it was read; run again when it is complete";
        let opened = || {
            write(&path, &tensors());
            // Times of changes are counted in ticks.
            std::thread::sleep(std::time::Duration::from_millis(20));
            SafetensorsFile::open_adapter(&path).expect("sound")
        };
        let of = |result: Result<()>| {
            let error = result.expect_err("it changed");
            assert!(matches!(error, Error::Adapter { .. }), "{error}");
            assert_eq!(error.to_string(), format!("{}: {sentence}", path.display()));
        };
        let file = opened();
        File::options().write(true).open(&path).expect("opened").set_len(2000).expect("cut");
        of(file.read(file.tensor("z").expect("there")).map(drop));
        of(file.sha256().map(drop));
        of(file.check_unchanged());
        let file = opened();
        let content = fs::read(&path).expect("read");
        fs::write(&path, &content).expect("written");
        of(file.check_unchanged());
        let file = opened();
        fs::rename(&path, path.with_extension("old")).expect("moved");
        file.read(file.tensor("z").expect("there")).expect("it is open");
        of(file.check_unchanged());
        fs::write(&path, &content).expect("written");
        of(file.check_unchanged());
    }
}
