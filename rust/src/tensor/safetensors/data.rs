//! A tensor as a value: what the header says of it, and the source of its bytes.

use std::ops::{ControlFlow, Deref, Range};
use std::path::Path;
use std::sync::Arc;

use super::{NamedTensor, TensorFile, TensorInfo, same_bytes};
use crate::error::{Owner, Result};
use crate::storage::memory::Bytes;
use crate::tensor::dtype::Dtype;

/// A tensor that reads itself, whether it is stored in a file or owned in memory.
#[derive(Debug, Clone)]
pub struct Tensor {
    file: Arc<TensorFile>,
    info: TensorInfo,
}

impl Deref for Tensor {
    type Target = TensorInfo;

    fn deref(&self) -> &TensorInfo {
        &self.info
    }
}

impl Tensor {
    /// One of a file's tensors.
    pub fn new(file: Arc<TensorFile>, info: TensorInfo) -> Self {
        Self { file, info }
    }

    /// A tensor of an adapter's that was computed. Errors about it name `path`.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if the bytes are not what type and shape say.
    pub fn in_memory(
        path: &Path,
        name: impl Into<String>,
        dtype: Dtype,
        shape: Vec<u64>,
        bytes: Vec<u8>,
    ) -> Result<Self> {
        let (name, bytes) = (name.into(), Some(Bytes::Loaded(bytes)));
        let tensors = vec![NamedTensor { name, dtype, shape, bytes }];
        let file = Arc::new(TensorFile::in_memory(path, Owner::Adapter, tensors, None)?);
        let info = file.header().tensors[0].clone();
        Ok(Self { file, info })
    }

    /// Its name, its type and its shape.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// What holds its bytes.
    pub fn file(&self) -> &Arc<TensorFile> {
        &self.file
    }

    /// Where its bytes begin in the source.
    pub fn offset(&self) -> u64 {
        self.file.data_start() + self.info.range.start
    }

    /// All of its bytes.
    ///
    /// # Errors
    /// That the file changed, or [`crate::Error::Io`].
    pub fn read(&self) -> Result<Vec<u8>> {
        self.file.read(&self.info)
    }

    /// Some of its bytes, counted from the first.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub fn read_range(&self, bytes: Range<u64>) -> Result<Vec<u8>> {
        self.file.read_range(&self.info, bytes)
    }

    /// Fills a buffer with its bytes from `offset` on.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_into(&self.info, offset, buffer)
    }

    /// Some of its rows, of `width` elements each.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub fn read_rows(&self, width: u64, rows: &Range<u64>) -> Result<Vec<u8>> {
        let row = width * self.dtype.size() as u64;
        self.read_range(rows.start * row..rows.end * row)
    }

    /// Hands its bytes on in order, as [`TensorFile::for_each_chunk`] does.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub fn for_each_chunk(
        &self,
        each: &mut dyn FnMut(u64, &[u8]) -> ControlFlow<()>,
    ) -> Result<()> {
        self.file.for_each_chunk(&self.info, each)
    }

    /// Whether another tensor holds the same bytes.
    ///
    /// # Errors
    /// That one of the files changed, or [`crate::Error::Io`].
    pub fn has_same_bytes(&self, other: &Self) -> Result<bool> {
        same_bytes((&self.file, &self.info), (&other.file, &other.info))
    }
}
