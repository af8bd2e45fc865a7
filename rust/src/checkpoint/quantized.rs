//! Weights that are stored as codes with scales, seen as the rows of numbers that they mean.
//!
//! A [`Quantised`] decodes any run of elements to f32, as the formats' own libraries do: the code's
//! value times the scale of its block, rounded once. And it encodes what became of them: a block
//! in which something changed gets the scale that its largest weight asks for and each weight the
//! nearest code, a block that is what it was keeps its bytes.

mod bitsandbytes;
mod blocks;
mod codes;
mod fp8;
mod mxfp4;
mod packed;
mod scales;
mod transposed;
mod unsupported;
mod weights;

use std::ops::Range;

use crate::checkpoint::{Checkpoint, Location};
use crate::error::{Error, Result};
use crate::tensor::safetensors::TensorInfo;

pub use blocks::Blocks;
pub use codes::Codes;
pub use scales::{Scales, Steps};
pub use transposed::Transposed;
pub use unsupported::UnsupportedFormat;
pub use weights::QuantizedWeights;

/// A tensor and the shard that it stands in.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The shard's position.
    pub shard: usize,
    /// The tensor.
    pub tensor: TensorInfo,
}

impl Stored {
    /// The tensor of that name.
    pub fn find(checkpoint: &Checkpoint, name: &str) -> Option<Self> {
        let location = checkpoint.tensors().get(name)?;
        Some(Self::under(name, checkpoint, *location))
    }

    /// The tensor at a place by the name that the checkpoint has for it, which need not be the file's.
    fn under(name: &str, checkpoint: &Checkpoint, location: Location) -> Self {
        let tensor = TensorInfo { name: name.to_owned(), ..checkpoint.at(location).clone() };
        Self { shard: location.shard, tensor }
    }

    /// Some of its bytes.
    ///
    /// # Errors
    /// That the file changed, or [`Error::Io`].
    pub fn read(&self, checkpoint: &Checkpoint, bytes: Range<usize>) -> Result<Vec<u8>> {
        let file = &checkpoint.shards()[self.shard].file;
        file.read_range(&self.tensor, bytes.start as u64..bytes.end as u64)
    }
}

/// One quantised weight of a checkpoint.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// What it means: the name and the shape that the model gives it, f32. The range is that of the
    /// codes.
    pub logical: TensorInfo,
    /// The tensor of the codes.
    pub stored: Stored,
    /// What the codes stand for.
    pub codes: Codes,
    /// Which elements share a scale.
    pub blocks: Blocks,
    /// The scales.
    pub scales: Scales,
    /// Every other tensor that means something only beside this one, [`Scales::tensors`] too.
    pub companions: Vec<String>,
    /// Where codes, and the blocks of them, do not lie in the model's order.
    pub transposed: Option<Transposed>,
    /// The format in words.
    pub scheme: String,
}

/// Scales that have to be known before the first element is encoded, because their blocks are too
/// tall to be held.
#[derive(Debug)]
pub struct Known {
    scales: Vec<f32>,
    changed: Vec<bool>,
}

/// The largest magnitude in each of a range of blocks, and whether anything in it changed.
#[derive(Debug)]
pub struct Extent {
    blocks: Range<usize>,
    largest: Vec<f32>,
    changed: Vec<bool>,
}

/// Elements as they are stored.
#[derive(Debug)]
pub struct Encoded {
    /// The bytes of the codes.
    pub codes: Vec<u8>,
    /// Their blocks.
    pub blocks: Range<usize>,
    /// The scale of each of the blocks, before a nested scheme quantises it.
    pub scales: Vec<f32>,
    /// Whether any block is not what it was.
    pub changed: bool,
    /// What the codes stand for, with the scales as they are before a nested scheme quantises them.
    pub stored: Vec<f32>,
}

/// What encoding can fail at besides the disk.
#[derive(Debug)]
pub enum Failure {
    /// An element, by its position, is beyond what codes without a scale can hold, or with the
    /// largest one that there is.
    Beyond(usize),
    /// The disk.
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Quantized {
    /// Bytes of that many elements from a whole byte on.
    pub(crate) fn bytes_of(&self, elements: usize) -> usize {
        if self.codes.is_packed() { elements.div_ceil(2) } else { elements }
    }

    /// Where the bytes of an element begin, among those of its tensor.
    pub fn byte_at(&self, element: usize) -> usize {
        if self.codes.is_packed() { element / 2 } else { element }
    }

    /// The weight as its codes lie: the name of their tensor, the shape in their order, f32.
    pub fn coded(&self) -> TensorInfo {
        let transposed = self.transposed.as_ref().map(|transposed| &transposed.shape);
        TensorInfo {
            name: self.stored.tensor.name.clone(),
            shape: transposed.unwrap_or(&self.logical.shape).clone(),
            ..self.logical.clone()
        }
    }

    /// The scales of some blocks.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if one is no number, [`Error::Io`].
    fn checked_scales(&self, checkpoint: &Checkpoint, blocks: Range<usize>) -> Result<Vec<f32>> {
        let scales = self.scales.read(checkpoint, blocks.clone())?;
        // Every exponent and every float of 8 bits is one by mistake or by a damaged file.
        let in_one_byte =
            matches!(self.scales, Scales::InUnits(_) | Scales::Plain(_, Steps::Exponents));
        match scales.iter().position(|scale| in_one_byte && scale.is_nan()) {
            Some(index) => {
                let tensor = &self.scales.tensors()[0].tensor.name;
                Err(Error::checkpoint(
                    checkpoint.path(),
                    format!(
                        "{tensor} has a scale that is no number (that of block {}), so that the \
                         weights of {} cannot be told; the file is damaged, fetch it again",
                        blocks.start + index,
                        self.logical.name
                    ),
                ))
            }
            None => Ok(scales),
        }
    }

    /// One code for each element, unpacked.
    fn read_codes(&self, checkpoint: &Checkpoint, elements: &Range<usize>) -> Result<Vec<u8>> {
        let start = self.byte_at(elements.start);
        let bytes = self.stored.read(checkpoint, start..self.bytes_of(elements.end))?;
        if !self.codes.is_packed() {
            return Ok(bytes);
        }
        let mut codes = vec![0; 2 * bytes.len()];
        let (first, second) = if self.codes.lower_half_first() { (0, 1) } else { (1, 0) };
        for (pair, byte) in codes.chunks_exact_mut(2).zip(bytes) {
            pair[first] = byte & 15;
            pair[second] = byte >> 4;
        }
        codes.drain(..elements.start % 2);
        codes.truncate(elements.len());
        Ok(codes)
    }

    fn pack(&self, codes: Vec<u8>) -> Vec<u8> {
        if !self.codes.is_packed() {
            return codes;
        }
        let byte = |pair: &[u8]| {
            let (first, second) = (pair[0], pair.get(1).copied().unwrap_or(0));
            if self.codes.lower_half_first() { second << 4 | first } else { first << 4 | second }
        };
        codes.chunks(2).map(byte).collect()
    }

    /// The numbers that a run of elements means, counted as the codes lie.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a scale is no number, [`Error::Io`].
    pub fn decode(&self, checkpoint: &Checkpoint, elements: &Range<usize>) -> Result<Vec<f32>> {
        let codes = self.read_codes(checkpoint, elements)?;
        let blocks = self.blocks.covering(elements);
        let scales = self.checked_scales(checkpoint, blocks.clone())?;
        let table = self.codes.table();
        let mut values = vec![0.0; codes.len()];
        self.blocks.runs(elements, |run, block| {
            let run = run.start - elements.start..run.end - elements.start;
            let scale = scales[block - blocks.start];
            self.codes.decode(&codes[run.clone()], &table, scale, &mut values[run]);
        });
        Ok(values)
    }

    /// Fills a buffer with the f32s from a byte of the logical tensor on, or of [`Self::coded`].
    ///
    /// # Errors
    /// Those of [`Self::decode`].
    pub fn read(
        &self,
        checkpoint: &Checkpoint,
        buffer: &mut [u8],
        offset: usize,
        as_coded: bool,
    ) -> Result<()> {
        let elements = offset / 4..(offset + buffer.len()) / 4;
        let values = match self.transposed.as_ref().filter(|_| !as_coded) {
            Some(transposed) => self.decode_transposed(checkpoint, transposed, &elements)?,
            None => self.decode(checkpoint, &elements)?,
        };
        buffer.copy_from_slice(bytemuck::cast_slice(&values));
        Ok(())
    }

    /// The extents of the blocks of a run of elements, from their values now and before.
    pub fn extent(&self, elements: &Range<usize>, values: &[f32], before: &[f32]) -> Extent {
        let blocks = self.blocks.covering(elements);
        let mut largest = vec![0f32; blocks.len()];
        let mut changed = vec![false; blocks.len()];
        self.blocks.runs(elements, |run, block| {
            let (block, run) =
                (block - blocks.start, run.start - elements.start..run.end - elements.start);
            let (values, before) = (&values[run.clone()], &before[run]);
            let largest = &mut largest[block];
            *largest = values.iter().fold(*largest, |largest, value| {
                let size = value.abs();
                if size > largest && size < f32::INFINITY { size } else { largest }
            });
            // NaN stays what it was, though it equals nothing.
            let pairs = values.iter().zip(before);
            changed[block] |= pairs.fold(false, |changed, (value, before)| {
                changed | (value != before && !(value.is_nan() && before.is_nan()))
            });
        });
        Extent { blocks, largest, changed }
    }

    /// Joins the extents of runs into what all blocks need.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn known(&self, checkpoint: &Checkpoint, extents: &[Extent]) -> Result<Known> {
        let count = self.blocks.count();
        let mut all =
            Extent { blocks: 0..count, largest: vec![0.0; count], changed: vec![false; count] };
        for extent in extents {
            for (index, block) in extent.blocks.clone().enumerate() {
                all.largest[block] = all.largest[block].max(extent.largest[index]);
                all.changed[block] |= extent.changed[index];
            }
        }
        let scales = self.scales_for(checkpoint, &all)?;
        Ok(Known { scales, changed: all.changed })
    }

    /// The stored scale where nothing changed, the one that the largest weight asks for where
    /// something did.
    fn scales_for(&self, checkpoint: &Checkpoint, extent: &Extent) -> Result<Vec<f32>> {
        let mut scales = self.scales.read(checkpoint, extent.blocks.clone())?;
        if matches!(self.scales, Scales::None) {
            return Ok(scales);
        }
        let unit = self.codes.largest();
        for (index, scale) in
            scales.iter_mut().enumerate().filter(|(index, _)| extent.changed[*index])
        {
            let largest = extent.largest[index];
            // Where the unit is 1, a scale of zero says that all is zero; a quotient cannot.
            *scale = if largest == 0.0 && unit > 1.0 {
                1.0
            } else {
                let wanted = largest / unit;
                self.scales.round(if unit > 1.0 { wanted.max(f32::MIN_POSITIVE) } else { wanted })
            };
        }
        Ok(scales)
    }

    /// Encodes a run of elements: whole blocks, where the scales are not known.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn encode(
        &self,
        checkpoint: &Checkpoint,
        elements: &Range<usize>,
        values: &[f32],
        before: &[f32],
        known: Option<&Known>,
    ) -> Result<Encoded, Failure> {
        let blocks = self.blocks.covering(elements);
        let (scales, changed) = match known {
            Some(known) => {
                (known.scales[blocks.clone()].to_vec(), known.changed[blocks.clone()].to_vec())
            }
            None => {
                let extent = self.extent(elements, values, before);
                (self.scales_for(checkpoint, &extent)?, extent.changed)
            }
        };
        let mut codes = self.read_codes(checkpoint, elements)?;
        let (mut beyond, mut stored, table) = (None, before.to_vec(), self.codes.table());
        self.blocks.runs(elements, |run, block| {
            let index = block - blocks.start;
            if !changed[index] {
                return;
            }
            let run = run.start - elements.start..run.end - elements.start;
            self.codes.encode(&values[run.clone()], scales[index], &mut codes[run.clone()]);
            let (codes, stored) = (&codes[run.clone()], &mut stored[run.clone()]);
            self.codes.decode(codes, &table, scales[index], stored);
            let reach = match self.scales {
                Scales::None => Some(self.codes.reach()),
                // The largest scale there is may be less than the right one: as far as rounding goes
                // between the outermost codes.
                Scales::InUnits(_) => Some(self.codes.largest() * 7.0 / 6.0 * scales[index]),
                _ => None,
            };
            if let Some(reach) = reach {
                let is_beyond = |position: &usize| {
                    let value = values[*position];
                    value.is_finite() && value.abs() > reach
                };
                if let Some(position) = run.clone().find(is_beyond) {
                    beyond.get_or_insert(elements.start + position);
                }
            }
        });
        if let Some(element) = beyond {
            return Err(Failure::Beyond(element));
        }
        let changed = changed.contains(&true);
        Ok(Encoded { codes: self.pack(codes), blocks, scales, changed, stored })
    }

    /// The bytes of the scales' tensors, [`Scales::tensors`], once all blocks are encoded.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_scales(
        &self,
        checkpoint: &Checkpoint,
        scales: &[f32],
        changed: bool,
    ) -> Result<Vec<Vec<u8>>> {
        if changed {
            return self.scales.write(checkpoint, scales);
        }
        let whole = |stored: &&Stored| stored.read(checkpoint, 0..stored.tensor.bytes() as usize);
        self.scales.tensors().iter().map(whole).collect()
    }
}

#[cfg(test)]
mod tests;
