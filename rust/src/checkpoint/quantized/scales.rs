//! The scales beside quantised weights: how they are read, rounded and written.

use super::Stored;
use super::codes::{Codes, Map};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::kernel::convert::{convert, widen, widen_f64};
use crate::tensor::dtype::Dtype;

/// Where the scale of each block stands.
#[derive(Debug, Clone)]
pub enum Scales {
    /// Nowhere: the codes are the weights.
    None,
    /// In a tensor of its own.
    Plain(Stored, Steps),
    /// In a tensor that is quantised itself.
    Nested(Box<Nested>),
    /// As floats of 8 bits in units of one number for the whole tensor.
    InUnits(Box<ScalesInUnits>),
}

/// NVFP4's scales: a float of 8 bits for each block, and one number for all of them.
#[derive(Debug, Clone)]
pub struct ScalesInUnits {
    /// A float (E4M3) for each block.
    pub codes: Stored,
    /// What each of them is multiplied by.
    pub unit: Unit,
}

/// The number for a whole tensor, which is kept when scales are written anew.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unit {
    /// Scales are multiplied by it (ModelOpt).
    Factor(f32),
    /// Scales are divided by it (compressed-tensors).
    Divisor(f32),
}

impl Unit {
    fn times(self, code: f32) -> f32 {
        match self {
            Self::Factor(unit) => code * unit,
            Self::Divisor(unit) => code / unit,
        }
    }

    /// How many units a scale is.
    fn units_in(self, scale: f32) -> f32 {
        match self {
            Self::Factor(unit) => scale / unit,
            Self::Divisor(unit) => scale * unit,
        }
    }
}

/// Which scales there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steps {
    /// All that the tensor's type can hold.
    All,
    /// Powers of two, rounded up so that no weight leaves the range of the codes.
    PowersOfTwo,
    /// Those, as the exponent in one byte, 127 for 1.
    Exponents,
}

/// Scales as bitsandbytes quantises them: 8-bit codes of what is left after an offset.
#[derive(Debug, Clone)]
pub struct Nested {
    /// A code for each block.
    pub codes: Stored,
    /// What the codes stand for.
    pub map: Map,
    /// The scale of each run of codes.
    pub scales: Stored,
    /// The length of a run.
    pub run: usize,
    /// What is added to all.
    pub offset: f32,
    /// The JSON in which the offset stands.
    pub state: Stored,
}

const OFFSET: &str = "\"nested_offset\":";

impl Scales {
    /// The tensors that are written anew with the weights.
    pub fn tensors(&self) -> Vec<&Stored> {
        match self {
            Self::None => Vec::new(),
            Self::Plain(stored, _) => vec![stored],
            Self::Nested(nested) => vec![&nested.codes, &nested.scales, &nested.state],
            Self::InUnits(scales) => vec![&scales.codes],
        }
    }

    /// The scales of those blocks.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn read(
        &self,
        checkpoint: &Checkpoint,
        blocks: std::ops::Range<usize>,
    ) -> Result<Vec<f32>> {
        match self {
            Self::None => Ok(vec![1.0; blocks.len()]),
            Self::Plain(stored, Steps::Exponents) => {
                let bytes = stored.read(checkpoint, blocks.start..blocks.end)?;
                Ok(bytes.into_iter().map(of_exponent).collect())
            }
            Self::Plain(stored, _) => {
                let size = stored.tensor.dtype.size();
                let bytes = stored.read(checkpoint, blocks.start * size..blocks.end * size)?;
                let mut values = vec![0.0; blocks.len()];
                widen(&stored.tensor.dtype, &bytes, &mut values);
                Ok(values)
            }
            Self::Nested(nested) => {
                let codes = nested.codes.read(checkpoint, blocks.clone())?;
                let runs = blocks.start / nested.run..blocks.end.div_ceil(nested.run);
                let bytes = nested.scales.read(checkpoint, runs.start * 4..runs.end * 4)?;
                let mut scales = vec![0.0; runs.len()];
                widen(&Dtype::F32, &bytes, &mut scales);
                Ok(codes
                    .into_iter()
                    .zip(blocks)
                    .map(|(code, block)| {
                        let scale = scales[block / nested.run - runs.start];
                        nested.map.values[usize::from(code)] * scale + nested.offset
                    })
                    .collect())
            }
            Self::InUnits(scales) => {
                let table = Codes::E4m3.table();
                let codes = scales.codes.read(checkpoint, blocks)?;
                let of_code = |code| scales.unit.times(table[usize::from(code)] as f32);
                Ok(codes.into_iter().map(of_code).collect())
            }
        }
    }

    /// The scale that is stored for one that would be right.
    pub fn round(&self, scale: f32) -> f32 {
        if let Self::InUnits(scales) = self {
            // The least one that is not zero, so that nothing is divided by zero.
            let code = scales.code_of(scale).max(1);
            return scales.unit.times(Codes::E4m3.table()[usize::from(code)] as f32);
        }
        let Self::Plain(stored, steps) = self else { return scale };
        match steps {
            Steps::PowersOfTwo | Steps::Exponents => power_of_two(scale),
            Steps::All => {
                let mut narrow = vec![0; stored.tensor.dtype.size()];
                convert(&Dtype::F32, &scale.to_le_bytes(), &stored.tensor.dtype, &mut narrow);
                let mut rounded = [0.0];
                widen(&stored.tensor.dtype, &narrow, &mut rounded);
                rounded[0]
            }
        }
    }

    /// The bytes of [`Self::tensors`] for the scales of all blocks.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn write(&self, checkpoint: &Checkpoint, scales: &[f32]) -> Result<Vec<Vec<u8>>> {
        match self {
            Self::None => Ok(Vec::new()),
            Self::Plain(_, Steps::Exponents) => {
                Ok(vec![scales.iter().map(|scale| exponent_of(*scale)).collect()])
            }
            Self::Plain(stored, _) => {
                let mut bytes = vec![0; scales.len() * stored.tensor.dtype.size()];
                convert(&Dtype::F32, &bytes_of(scales), &stored.tensor.dtype, &mut bytes);
                Ok(vec![bytes])
            }
            Self::Nested(nested) => nested.write(checkpoint, scales),
            Self::InUnits(in_units) => {
                Ok(vec![scales.iter().map(|scale| in_units.code_of(*scale)).collect()])
            }
        }
    }
}

impl ScalesInUnits {
    /// The nearest code, the largest one beyond it.
    fn code_of(&self, scale: f32) -> u8 {
        let mut code = [0];
        Codes::E4m3.encode(&[self.unit.units_in(scale)], 1.0, &mut code);
        code[0]
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

impl Nested {
    fn write(&self, checkpoint: &Checkpoint, scales: &[f32]) -> Result<Vec<Vec<u8>>> {
        let state = self.state.read(checkpoint, 0..self.state.tensor.bytes() as usize)?;
        let mean = scales.iter().map(|scale| f64::from(*scale)).sum::<f64>() / scales.len() as f64;
        let (state, offset) =
            with_offset(&state, mean as f32).unwrap_or_else(|| (state.clone(), self.offset));
        let mut codes = Vec::with_capacity(scales.len());
        let mut outer = Vec::with_capacity(scales.len().div_ceil(self.run));
        for run in scales.chunks(self.run) {
            let rest: Vec<f32> = run.iter().map(|scale| scale - offset).collect();
            let largest = rest.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let unit = largest.max(1e-38);
            codes.extend(rest.iter().map(|value| self.map.nearest(value / unit)));
            outer.push(largest);
        }
        Ok(vec![codes, bytes_of(&outer), state])
    }

    /// The scale of each run.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn largest(&self, checkpoint: &Checkpoint) -> Result<Vec<f64>> {
        let bytes = self.scales.read(checkpoint, 0..self.scales.tensor.bytes() as usize)?;
        Ok(widen_f64(&Dtype::F32, &bytes))
    }

    /// The most that a stored scale can be off from the right one, in units of its run's scale.
    pub fn half_step(&self) -> f64 {
        let mut values = self.map.values.clone();
        values.sort_by(f32::total_cmp);
        values.windows(2).map(|pair| f64::from(pair[1] - pair[0]) / 2.0).fold(0.0, f64::max)
    }
}

/// The JSON with another offset, as long as it was, and the offset as it reads there: with as many
/// digits as have room. `None` where there is room for none.
fn with_offset(state: &[u8], offset: f32) -> Option<(Vec<u8>, f32)> {
    let text = std::str::from_utf8(state).ok()?;
    let start = text.find(OFFSET)? + OFFSET.len();
    let start = start + text[start..].len() - text[start..].trim_start().len();
    let length = text[start..].find([',', '}'])?;
    // Python writes the f32 as an f64; fewer digits tell it as well.
    let mut spellings =
        vec![format!("{}", f64::from(offset)), format!("{offset}"), format!("{offset:e}")];
    spellings.extend((0..8).rev().map(|digits| format!("{offset:.digits$e}")));
    let spelling = spellings.into_iter().find(|spelling| spelling.len() <= length)?;
    let read: f32 = spelling.parse().ok().filter(|value: &f32| value.is_finite())?;
    let text = format!("{}{spelling:<length$}{}", &text[..start], &text[start + length..]);
    Some((text.into_bytes(), read))
}

/// The least power of two that is no smaller.
fn power_of_two(scale: f32) -> f32 {
    let bits = scale.max(f32::MIN_POSITIVE).to_bits();
    let up = bits.next_multiple_of(1 << 23).min(254 << 23);
    f32::from_bits(up)
}

fn of_exponent(byte: u8) -> f32 {
    match byte {
        // 2⁻¹²⁷ is subnormal.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        byte => f32::from_bits(u32::from(byte) << 23),
    }
}

fn exponent_of(scale: f32) -> u8 {
    if scale.is_nan() { 255 } else { ((scale.to_bits() >> 23) & 0xff) as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_rounded_up() {
        assert_eq!(power_of_two(1.0), 1.0);
        assert_eq!(power_of_two(1.001), 2.0);
        assert_eq!(power_of_two(0.3), 0.5);
        for scale in [1.0, 2.0f32.powi(-126), 2.0f32.powi(-127), 0.25] {
            assert_eq!(of_exponent(exponent_of(scale)), scale);
        }
    }

    #[test]
    fn an_offset_is_written_in_the_room_there_is() {
        let state = br#"{"a": 1, "nested_offset": 0.05021226778626442, "b": 2}"#;
        let (changed, read) = with_offset(state, 0.1).expect("room");
        assert_eq!(changed.len(), state.len());
        let json: serde_json::Value = serde_json::from_slice(&changed).expect("JSON");
        assert_eq!(json["nested_offset"].as_f64().map(|value| value as f32), Some(0.1));
        assert_eq!((read, json["b"].as_u64()), (0.1, Some(2)));
        let (changed, read) =
            with_offset(br#"{"nested_offset": 0.0625}"#, 0.123_456).expect("room");
        assert_eq!(changed, br#"{"nested_offset": 1.2e-1}"#);
        assert_eq!(read, 0.12);
        assert!(with_offset(br#"{"nested_offset": 0.0}"#, 0.123).is_none());
    }
}
