//! Where the values of a population lie: in memory, or in a file that is read a segment at a time.

use std::cell::Cell;
use std::ops::Range;

use super::element::{ElementType, Tensor};
use crate::error::{Error, Result};
use crate::tensor::safetensors::{TensorFile, TensorInfo};

thread_local! {
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Lends the thread's buffer, which keeps its pages from one read to the next. Work that waits for
/// other threads may begin more work on this one, which finds an empty buffer then.
pub(crate) fn with_room<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut room = ROOM.take();
    let result = work(&mut room);
    ROOM.set(room);
    result
}

/// Bytes up to which a tensor is read at once where it is looked at several times.
const WHOLE: usize = 8 << 20;

/// A tensor of which any run of elements can be had, more than once.
pub trait Source: Sync {
    /// The elements' type.
    fn element(&self) -> ElementType;

    /// The number of elements.
    fn len(&self) -> usize;

    /// Whether there is no element.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of the elements, in the buffer where they lie elsewhere than in memory.
    ///
    /// # Errors
    /// Those of reading.
    fn read<'b>(&'b self, elements: Range<usize>, buffer: &'b mut Vec<u8>) -> Result<Tensor<'b>>;

    /// All elements in the buffer, where that saves reading them several times and takes little room.
    ///
    /// # Errors
    /// Those of reading.
    fn read_whole<'b>(&'b self, _buffer: &'b mut Vec<u8>) -> Result<Option<Tensor<'b>>> {
        Ok(None)
    }

    /// The error for elements that are not what they were when they were last read.
    fn changed(&self) -> Error;
}

impl Source for Tensor<'_> {
    fn element(&self) -> ElementType {
        Tensor::element(self)
    }

    fn len(&self) -> usize {
        Tensor::len(self)
    }

    fn read<'b>(&'b self, elements: Range<usize>, _: &'b mut Vec<u8>) -> Result<Tensor<'b>> {
        Ok(self.slice(elements.start, elements.end))
    }

    fn changed(&self) -> Error {
        unreachable!("borrowed values do not change")
    }
}

/// A tensor of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InFile<'a> {
    file: &'a TensorFile,
    tensor: &'a TensorInfo,
    element: ElementType,
}

impl<'a> InFile<'a> {
    /// That tensor, if there are statistics of its type.
    pub fn new(file: &'a TensorFile, tensor: &'a TensorInfo) -> Option<Self> {
        let element = ElementType::from_dtype(&tensor.dtype)?;
        Some(Self { file, tensor, element })
    }
}

impl Source for InFile<'_> {
    fn element(&self) -> ElementType {
        self.element
    }

    fn len(&self) -> usize {
        self.tensor.elements() as usize
    }

    fn read<'b>(&'b self, elements: Range<usize>, buffer: &'b mut Vec<u8>) -> Result<Tensor<'b>> {
        let size = self.element.size();
        let bytes = elements.len() * size;
        if buffer.len() < bytes {
            buffer.resize(bytes, 0);
        }
        let bytes = &mut buffer[..bytes];
        self.file.read_into(self.tensor, (elements.start * size) as u64, bytes)?;
        Tensor::new(bytes, self.element)
    }

    fn read_whole<'b>(&'b self, buffer: &'b mut Vec<u8>) -> Result<Option<Tensor<'b>>> {
        let is_small = self.tensor.bytes() <= WHOLE as u64;
        is_small.then(|| self.read(0..self.len(), buffer)).transpose()
    }

    fn changed(&self) -> Error {
        self.file.changed()
    }
}
