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
mod scales;
mod unsupported;

use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;

use crate::checkpoint::{Checkpoint, Location};
use crate::error::{Error, Result};
use crate::tensor::safetensors::TensorInfo;

pub use blocks::Blocks;
pub use codes::Codes;
pub use scales::{Scales, Steps};
pub use unsupported::UnsupportedFormat;

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
    /// What it means: its name, the shape that the model gives it, f32. The range is that of the
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
    /// An element, by its position, is beyond what codes without a scale can hold.
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
    fn bytes_of(&self, elements: usize) -> usize {
        if self.codes.is_packed() { elements.div_ceil(2) } else { elements }
    }

    /// Where the bytes of an element begin, among those of its tensor.
    pub fn byte_at(&self, element: usize) -> usize {
        if self.codes.is_packed() { element / 2 } else { element }
    }

    /// One code for each element, unpacked.
    fn read_codes(&self, checkpoint: &Checkpoint, elements: &Range<usize>) -> Result<Vec<u8>> {
        let start = self.byte_at(elements.start);
        let bytes = self.stored.read(checkpoint, start..self.bytes_of(elements.end))?;
        if !self.codes.is_packed() {
            return Ok(bytes);
        }
        let mut codes = vec![0; 2 * bytes.len()];
        for (pair, byte) in codes.chunks_exact_mut(2).zip(bytes) {
            pair[0] = byte >> 4;
            pair[1] = byte & 15;
        }
        codes.drain(..elements.start % 2);
        codes.truncate(elements.len());
        Ok(codes)
    }

    fn pack(&self, codes: Vec<u8>) -> Vec<u8> {
        if !self.codes.is_packed() {
            return codes;
        }
        codes.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0)).collect()
    }

    /// The numbers that a run of elements means.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn decode(&self, checkpoint: &Checkpoint, elements: &Range<usize>) -> Result<Vec<f32>> {
        let codes = self.read_codes(checkpoint, elements)?;
        let blocks = self.blocks.covering(elements);
        let scales = self.scales.read(checkpoint, blocks.clone())?;
        let table = self.codes.table();
        let mut values = vec![0.0; codes.len()];
        self.blocks.runs(elements, |run, block| {
            let run = run.start - elements.start..run.end - elements.start;
            let scale = scales[block - blocks.start];
            self.codes.decode(&codes[run.clone()], &table, scale, &mut values[run]);
        });
        Ok(values)
    }

    /// Fills a buffer with the f32s from a byte of the logical tensor on.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, checkpoint: &Checkpoint, buffer: &mut [u8], offset: usize) -> Result<()> {
        let elements = offset / 4..(offset + buffer.len()) / 4;
        buffer.copy_from_slice(bytemuck::cast_slice(&self.decode(checkpoint, &elements)?));
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
            if matches!(self.scales, Scales::None) {
                let is_beyond = |position: &usize| {
                    let value = values[*position];
                    value.is_finite() && value.abs() > self.codes.reach()
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

/// The quantised weights of a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct QuantizedWeights {
    /// By the name of the tensor of codes, which is the weight's.
    entries: IndexMap<String, Arc<Quantized>>,
    /// Weights whose layout cannot be read, by name, with the reason.
    unreadable: IndexMap<String, String>,
    /// By the name of a companion: its weight.
    companions: IndexMap<String, String>,
    /// Weights in formats that are not read at all.
    unsupported: Option<UnsupportedFormat>,
}

impl QuantizedWeights {
    /// Finds every quantised weight by its companions and the config.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let mut weights =
            Self { unsupported: UnsupportedFormat::of(checkpoint), ..Self::default() };
        for (name, location) in checkpoint.tensors() {
            let stored = Stored::under(name, checkpoint, *location);
            let unsupported = weights.unsupported.as_ref();
            if unsupported.is_some_and(|unsupported| unsupported.holds_tensor(name)) {
                continue;
            }
            let found = match stored.tensor.dtype.name() {
                "F8_E4M3" | "F8_E5M2" => fp8::read(checkpoint, &stored),
                "I8" => bitsandbytes::read_int8(checkpoint, &stored),
                // Packed codes can lie in a tensor of any type (quant_storage).
                _ => bitsandbytes::read_four_bit(checkpoint, &stored),
            };
            match found {
                Some(Ok(quantized)) => {
                    for companion in &quantized.companions {
                        weights.companions.insert(companion.clone(), name.clone());
                    }
                    weights.entries.insert(name.clone(), Arc::new(quantized));
                }
                Some(Err(problem)) => {
                    weights.unreadable.insert(name.clone(), problem);
                }
                None => {}
            }
        }
        // A scale of 8 bits looks like a weight without one.
        let companions = &weights.companions;
        weights.entries.retain(|name, _| !companions.contains_key(name));
        weights.unreadable.retain(|name, _| !companions.contains_key(name));
        weights
    }

    /// The weight of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<Quantized>> {
        self.entries.get(name)
    }

    /// All of them.
    pub fn entries(&self) -> &IndexMap<String, Arc<Quantized>> {
        &self.entries
    }

    /// The weight that a tensor accompanies.
    pub fn owner(&self, companion: &str) -> Option<&str> {
        self.companions.get(companion).map(String::as_str)
    }

    /// Formats that are not read.
    pub fn unsupported(&self) -> Option<&UnsupportedFormat> {
        self.unsupported.as_ref()
    }

    /// Why a weight cannot be read.
    pub fn problem(&self, name: &str) -> Option<&str> {
        self.unreadable.get(name).map(String::as_str)
    }

    /// The weights that cannot be read, with the reasons.
    pub fn problems(&self) -> &IndexMap<String, String> {
        &self.unreadable
    }

    /// The schemes in words, each with the number of its weights.
    pub fn schemes(&self) -> IndexMap<&str, usize> {
        let mut schemes = IndexMap::new();
        for entry in self.entries.values() {
            *schemes.entry(entry.scheme.as_str()).or_default() += 1;
        }
        schemes
    }
}

#[cfg(test)]
mod tests;
