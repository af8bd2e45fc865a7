//! One file of tensors: its checked header, and a source that holds its data.
//!
//! Nothing is mapped. Files belong to others, who may truncate them at any time (saving again does),
//! and a map's missing page kills the process; a read that finds less than the header promised is an
//! error like any other. What was written to in place is found by [`TensorFile::check_unchanged`]
//! once everything was read.

mod computed;
mod data;
mod header;
mod joined;
pub mod write;

use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

pub use computed::{Make, Recipe};
pub use data::Tensor;
pub use header::{Header, TensorInfo};

use crate::error::{Error, Owner, Result};
use crate::storage::digest::{hexadecimal, sha256_of};
use crate::storage::identify;
use crate::storage::local::Stamp;
use crate::storage::memory::{Bytes, Memory};
use crate::storage::source::{self, LocalFile, Source};
use crate::storage::store::Store;
use crate::tensor::dtype::Dtype;
use header::{PREFIX, Parsed, Positions};

/// Bytes that are looked at together where a whole tensor or file goes by: small enough to stay in
/// the second-level cache beside what they are held against.
pub const CHUNK: usize = 256 << 10;

/// Tensors under one header, and the source from which their data is read: an opened safetensors
/// file, or tensors in memory.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    owner: Owner,
    source: Box<dyn Source>,
    stamp: Stamp,
    /// Length prefix and header, as they were read where there is a safetensors file.
    beginning: Vec<u8>,
    /// Where the data begins in the source.
    data_start: u64,
    header: Header,
    positions: Positions,
}

/// A tensor that is in memory already: its name, its type, its shape and its bytes.
#[derive(Debug, Clone)]
pub struct NamedTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: Vec<u64>,
    /// Its values, row-major, little-endian; or none, where there are none to read, and then they
    /// read as zeros.
    pub bytes: Option<Bytes>,
}

impl NamedTensor {
    /// The bytes that its type and its shape make; `None` where they are not known.
    pub fn expected_bytes(&self) -> Option<u64> {
        let elements = self.shape.iter().try_fold(1u64, |all, extent| all.checked_mul(*extent));
        Some(elements?.checked_mul(self.dtype.bits()?)? / 8)
    }
}

impl TensorFile {
    /// Opens and checks a safetensors file of a model.
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
        let source = LocalFile::open(path).map_err(|error| error.of(owner))?;
        Self::from_source(path, owner, Box::new(source))
    }

    /// Opens and checks a safetensors file of a store.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, the owner's class if it is not sound.
    pub fn open_in(store: &dyn Store, name: &str, owner: Owner) -> Result<Self> {
        let source = store.open(name).map_err(|error| error.of(owner))?;
        Self::from_source(&store.path(name), owner, source)
    }

    fn from_source(path: &Path, owner: Owner, source: Box<dyn Source>) -> Result<Self> {
        // What is no safetensors file at all is called what it is.
        let broken = |message: String| {
            let found = identify::of_source(&*source).filter(|found| !found.is_safetensors());
            owner.broken(path, found.map_or(message, |found| found.sentence()))
        };
        let (stamp, size) = (source.stamp(), source.stamp().length);
        if size < PREFIX {
            return Err(broken(format!(
                "is truncated: {size} bytes are too few for a safetensors file; fetch it again"
            )));
        }
        let failed = |error| owner.unread(path, error);
        let mut beginning = vec![0; PREFIX as usize];
        source.read_at(&mut beginning, 0).map_err(failed)?;
        let length = header::length(&beginning, size).map_err(broken)?;
        beginning.resize((PREFIX + length) as usize, 0);
        source.read_at(&mut beginning[PREFIX as usize..], PREFIX).map_err(failed)?;
        let Parsed { header, positions } = header::parse(&beginning, size).map_err(broken)?;
        let (path, data_start) = (path.to_path_buf(), beginning.len() as u64);
        Ok(Self { path, owner, source, stamp, beginning, data_start, header, positions })
    }

    /// Tensors that are in memory: what a pickle held, or what was computed. Errors about them name
    /// `path`; where they were made from that file, its stamp tells whether it is still the same.
    ///
    /// # Errors
    /// In the owner's class, if the tensors are not what their shapes and types say, or two of them
    /// have one name.
    pub fn in_memory(
        path: &Path,
        owner: Owner,
        tensors: Vec<NamedTensor>,
        made_from: Option<Stamp>,
    ) -> Result<Self> {
        let mut runs = Vec::with_capacity(tensors.len());
        let mut header = Header::default();
        let mut size = 0;
        for tensor in tensors {
            let expected = tensor.expected_bytes();
            let NamedTensor { name, dtype, shape, bytes } = tensor;
            let length = bytes.as_ref().map(Bytes::length).or(expected);
            let end = length.and_then(|length| length.checked_add(size)).ok_or_else(|| {
                owner
                    .broken(path, format!("has {name} of shape {shape:?}, whose size is not known"))
            })?;
            runs.extend(bytes.filter(|bytes| bytes.length() > 0).map(|bytes| (size, bytes)));
            header.tensors.push(TensorInfo { name, dtype, shape, range: size..end });
            size = end;
        }
        let memory = Memory::new(runs, size);
        let source: Box<dyn Source> = match made_from {
            Some(stamp) => Box::new(memory.made_from(path, stamp)),
            None => Box::new(memory),
        };
        // Encoded and parsed: what was handed over is checked like a file's header.
        let beginning = header.encode();
        let all = beginning.len() as u64 + size;
        let Parsed { header, positions } =
            header::parse(&beginning, all).map_err(|message| owner.broken(path, message))?;
        let (path, stamp) = (path.to_path_buf(), source.stamp());
        Ok(Self { path, owner, source, stamp, beginning, data_start: 0, header, positions })
    }

    /// Puts something before the name of every tensor. The header's bytes stay as they are.
    pub fn name_under(&mut self, prefix: &str) {
        if !prefix.is_empty() {
            for tensor in &mut self.header.tensors {
                tensor.name.insert_str(0, prefix);
            }
            self.positions = Positions::of(&self.header.tensors);
        }
    }

    /// Tensors of another container, of which its reader has checked the header: where each lies is
    /// counted from `data_start`.
    pub(super) fn of_header(
        path: &Path,
        owner: Owner,
        source: Box<dyn Source>,
        data_start: u64,
        header: Header,
    ) -> Self {
        let (path, stamp) = (path.to_path_buf(), source.stamp());
        let positions = Positions::of(&header.tensors);
        Self { path, owner, source, stamp, beginning: Vec::new(), data_start, header, positions }
    }

    /// Tensors of a file that has nothing but their bytes: the header tells where each lies.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened.
    pub(crate) fn of_raw_file(path: &Path, owner: Owner, header: Header) -> Result<Self> {
        let source = LocalFile::open(path).map_err(|error| error.of(owner))?;
        Ok(Self::of_header(path, owner, Box::new(source), 0, header))
    }

    /// The files of one adapter or model as one: their tensors, and bytes one after the other. Errors
    /// about them name `path`.
    ///
    /// # Errors
    /// In the owner's class, if two of them have a tensor of one name.
    pub fn joined(path: &Path, owner: Owner, files: Vec<Self>) -> Result<Self> {
        let mut header = Header::default();
        let (mut parts, mut end) = (Vec::with_capacity(files.len()), 0);
        let mut beginnings = Vec::new();
        for file in files {
            for tensor in &file.header.tensors {
                let range = end + tensor.range.start..end + tensor.range.end;
                header.tensors.push(TensorInfo { range, ..tensor.clone() });
            }
            header.metadata.extend(file.header.metadata.clone());
            beginnings.extend_from_slice(&file.beginning);
            let length = file.header.data_bytes();
            parts.push(joined::Part {
                source: file.source,
                start: end,
                first: file.data_start,
                length,
            });
            end += length;
        }
        let beginning = header.encode();
        let all = beginning.len() as u64 + end;
        let Parsed { header, positions } =
            header::parse(&beginning, all).map_err(|message| owner.broken(path, message))?;
        // Behind the data, so that a digest of all bytes is one of the names, too.
        let source: Box<dyn Source> = Box::new(joined::Joined { parts, end, names: beginnings });
        let (path, stamp) = (path.to_path_buf(), source.stamp());
        Ok(Self { path, owner, source, stamp, beginning, data_start: 0, header, positions })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What holds the bytes.
    pub fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// What the file was when it was opened.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Bytes of the whole source.
    pub fn size(&self) -> u64 {
        self.stamp.length
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the source before the data: length prefix and header, of a safetensors file.
    pub fn data_start(&self) -> u64 {
        self.data_start
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

    /// The tensor of that name as a value that reads itself.
    pub fn value(self: &Arc<Self>, name: &str) -> Option<Tensor> {
        self.tensor(name).map(|info| Tensor::new(self.clone(), info.clone()))
    }

    /// Some of a tensor's bytes, counted from its first.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read_range(&self, tensor: &TensorInfo, bytes: Range<u64>) -> Result<Vec<u8>> {
        let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
        self.read_into(tensor, bytes.start, &mut buffer)?;
        Ok(buffer)
    }

    /// Fills a buffer with a tensor's bytes from `offset` on.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read_into(&self, tensor: &TensorInfo, offset: u64, buffer: &mut [u8]) -> Result<()> {
        debug_assert!(offset + buffer.len() as u64 <= tensor.bytes(), "within the tensor");
        self.read_raw(self.data_start() + tensor.range.start + offset, buffer)
    }

    /// Fills a buffer with the file's bytes from `offset` on.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read_raw(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.source.read_at(buffer, offset).map_err(|error| self.unread(error))
    }

    /// The bytes of a run, where all of them go by.
    fn run(&self) -> usize {
        (self.source.piece().unwrap_or(0).min(self.size()) as usize).max(CHUNK)
    }

    /// Hands a tensor's bytes on in order, run after run with where each begins, until nobody wants
    /// more. All runs but the last are of one length that is a multiple of an element's.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn for_each_chunk(
        &self,
        tensor: &TensorInfo,
        each: &mut dyn FnMut(u64, &[u8]) -> ControlFlow<()>,
    ) -> Result<()> {
        self.for_each_run(tensor, self.run(), each)
    }

    fn for_each_run(
        &self,
        tensor: &TensorInfo,
        run: usize,
        each: &mut dyn FnMut(u64, &[u8]) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; run.min(tensor.bytes() as usize)];
        for start in (0..tensor.bytes()).step_by(run) {
            let chunk = &mut buffer[..run.min((tensor.bytes() - start) as usize)];
            self.read_into(tensor, start, chunk)?;
            if each(start, chunk).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// The SHA-256 of the open file, in hexadecimal: of what was opened, whatever its path leads to
    /// by now. Of tensors that were made from a file, that file's.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn sha256(&self) -> Result<String> {
        if let Some(origin) = self.source.origin() {
            let digest = sha256_of(origin)?;
            return self.check_unchanged().map(|()| digest);
        }
        let mut hasher = Sha256::new();
        let run = self.run();
        let mut buffer = vec![0; run.min(self.size() as usize)];
        for start in (0..self.size()).step_by(run) {
            let chunk = &mut buffer[..run.min((self.size() - start) as usize)];
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
        match self.source.is_unchanged() {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.changed()),
            Err(error) => Err(Error::io(&self.path, error)),
        }
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

/// Looks again at what a path leads to: an error if it is not what had that stamp.
///
/// # Errors
/// That the file changed, or [`Error::Io`].
pub(crate) fn check_path(owner: Owner, path: &Path, stamp: Stamp) -> Result<()> {
    match source::leads_to(path, stamp) {
        Ok(true) => Ok(()),
        Ok(false) => Err(owner.changed(path)),
        Err(error) => Err(Error::io(path, error)),
    }
}

/// Whether two tensors hold the same bytes, which are looked at a run at a time.
///
/// # Errors
/// That one of the files changed, or [`Error::Io`].
pub fn same_bytes(
    (left_file, left): (&TensorFile, &TensorInfo),
    (right_file, right): (&TensorFile, &TensorInfo),
) -> Result<bool> {
    if left.bytes() != right.bytes() {
        return Ok(false);
    }
    let (mut same, mut failure) = (true, None);
    let mut buffer = Vec::new();
    let run = left_file.run().max(right_file.run());
    left_file.for_each_run(left, run, &mut |start, bytes| {
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
    use std::fs;

    use super::*;
    use crate::fixtures::{ramp, write};

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
        let file = TensorFile::open(&path).expect("sound");
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
        assert_eq!(file.sha256().expect("read"), crate::storage::digest::sha256_of_bytes(&content));
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
            TensorFile::open_adapter(&path).expect("sound")
        };
        let of = |result: Result<()>| {
            let error = result.expect_err("it changed");
            assert!(matches!(error, Error::Adapter { .. }), "{error}");
            assert_eq!(error.to_string(), format!("{}: {sentence}", path.display()));
        };
        let file = opened();
        fs::File::options().write(true).open(&path).expect("opened").set_len(2000).expect("cut");
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
