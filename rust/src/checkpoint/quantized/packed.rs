//! Weights as compressed-tensors stores them besides fp8: integers of 8 bits in bytes or of 4 and 8
//! bits packed into words, NVFP4 and MXFP4; and NVFP4 as ModelOpt stores it.

use serde_json::Value;

use super::blocks::Blocks;
use super::codes::Codes;
use super::scales::{Scales, ScalesInUnits, Steps, Unit};
use super::{Quantized, Stored, fp8, unsupported};
use crate::checkpoint::Checkpoint;
use crate::kernel::convert::widen;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;

const PACKED: &str = "_packed";
/// What else a quantised module has, for its activations and its cache.
const ATTACHMENTS: [&str; 10] = [
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "q_scale",
    "k_scale",
    "v_scale",
    "k_zero_point",
    "v_zero_point",
];
/// Weights of NVFP4 that share a scale.
const NVFP4_RUN: u64 = 16;
/// Weights of MXFP4 that share a scale.
const MXFP4_RUN: u64 = 32;

/// The name of the weight whose codes a tensor holds.
pub(super) fn parameter(name: &str) -> Option<&str> {
    name.strip_suffix(PACKED).filter(|parameter| parameter.ends_with(".weight"))
}

/// A weight whose layout is being read, in a checkpoint.
struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    stored: &'a Stored,
    /// The name that the model gives it.
    parameter: &'a str,
    companions: Vec<String>,
}

/// Reads the layout of what lies packed.
pub(super) fn read(
    checkpoint: &Checkpoint,
    stored: &Stored,
    parameter: &str,
) -> Result<Quantized, String> {
    let reader = Reader::new(checkpoint, stored, parameter);
    match stored.tensor.dtype.name() {
        "U8" => reader.four_bit_floats(),
        "I32" => reader.integers_in_words(),
        other => Err(format!("has its codes in {} as {other}", stored.tensor.name)),
    }
}

/// Reads the layout of integers that have a byte each; `None` for those without a scale.
pub(super) fn read_int8(
    checkpoint: &Checkpoint,
    stored: &Stored,
) -> Option<Result<Quantized, String>> {
    let name = &stored.tensor.name;
    let scale = Stored::find(checkpoint, &format!("{name}_scale"))?;
    Some(Reader::new(checkpoint, stored, name).integers_in_bytes(scale))
}

/// Reads the layout of ModelOpt's NVFP4; `None` for bytes without its scales.
pub(super) fn read_modelopt(
    checkpoint: &Checkpoint,
    stored: &Stored,
) -> Option<Result<Quantized, String>> {
    let name = &stored.tensor.name;
    checkpoint.tensor(&format!("{name}_scale_2"))?;
    Some(Reader::new(checkpoint, stored, name).four_bit_floats())
}

impl<'a> Reader<'a> {
    fn new(checkpoint: &'a Checkpoint, stored: &'a Stored, parameter: &'a str) -> Self {
        Self { checkpoint, stored, parameter, companions: Vec::new() }
    }

    /// The tensor whose name is the weight's and this, which is then a companion.
    fn beside(&mut self, ending: &str) -> Option<Stored> {
        let found = Stored::find(self.checkpoint, &format!("{}{ending}", self.parameter))?;
        self.companions.push(found.tensor.name.clone());
        Some(found)
    }

    fn scale(&mut self) -> Result<Stored, String> {
        let parameter = self.parameter;
        self.beside("_scale").ok_or_else(|| format!("has no {parameter}_scale beside it"))
    }

    fn finish(
        self,
        shape: Vec<u64>,
        codes: Codes,
        blocks: Blocks,
        scales: Scales,
        scheme: String,
    ) -> Quantized {
        let Self { checkpoint, stored, parameter, mut companions } = self;
        let module = parameter.strip_suffix(".weight").unwrap_or(parameter);
        let attachments = ATTACHMENTS.iter().map(|leaf| format!("{module}.{leaf}"));
        companions.extend(attachments.filter(|name| checkpoint.tensor(name).is_some()));
        Quantized {
            logical: TensorInfo {
                name: parameter.to_owned(),
                dtype: Dtype::F32,
                shape,
                ..stored.tensor.clone()
            },
            stored: stored.clone(),
            codes,
            blocks,
            scales,
            companions,
            transposed: None,
            scheme,
        }
    }

    /// NVFP4 or MXFP4: two floats to a byte.
    fn four_bit_floats(mut self) -> Result<Quantized, String> {
        let scale = self.scale()?;
        let TensorInfo { name, shape, .. } = &self.stored.tensor;
        let mut shape = shape.clone();
        let Some(width) = shape.last_mut().filter(|width| **width > 0) else {
            return Err(format!("has its codes in {name} of shape {:?}", self.stored.tensor.shape));
        };
        *width *= 2;
        let width = *width;
        let (run, word) = match scale.tensor.dtype.name() {
            "F8_E4M3" => (NVFP4_RUN, "NVFP4"),
            "U8" | "F8_E8M0" => (MXFP4_RUN, "MXFP4"),
            other => return Err(format!("has its scale {} stored as {other}", scale.tensor.name)),
        };
        let mut fitting = shape.clone();
        fitting.pop();
        fitting.push(width / run);
        if !width.is_multiple_of(run) || scale.tensor.shape != fitting {
            return Err(format!(
                "has a scale {} of shape {:?}, which does not fit {shape:?} in runs of {run}",
                scale.tensor.name, scale.tensor.shape
            ));
        }
        let height = shape[..shape.len() - 1].iter().product::<u64>();
        let blocks = Blocks::Grid {
            height: height as usize,
            width: width as usize,
            block_height: 1,
            block_width: run as usize,
            matrices: 1,
        };
        if word == "MXFP4" {
            let words = format!("MXFP4 with a scale, a power of two, for every {run} weights");
            let scales = Scales::Plain(scale, Steps::Exponents);
            return Ok(self.finish(shape, Codes::E2m1, blocks, scales, words));
        }
        let unit = match (self.beside("_global_scale"), self.beside("_scale_2")) {
            (Some(global), _) => Unit::Divisor(self.number(&global)?),
            (None, Some(global)) => Unit::Factor(self.number(&global)?),
            (None, None) => {
                return Err(format!("has no {}_global_scale beside it", self.parameter));
            }
        };
        let words = format!("NVFP4 with a scale of 8 bits for every {run} weights");
        let scales = Scales::InUnits(Box::new(ScalesInUnits { codes: scale, unit }));
        Ok(self.finish(shape, Codes::E2m1, blocks, scales, words))
    }

    /// The one number of a tensor, by which others are multiplied or divided.
    fn number(&self, stored: &Stored) -> Result<f32, String> {
        let TensorInfo { name, dtype, shape, .. } = &stored.tensor;
        if *dtype != Dtype::F32 || stored.tensor.elements() != 1 {
            return Err(format!("has {name} as {dtype} of shape {shape:?} instead of one F32"));
        }
        let bytes = stored.read(self.checkpoint, 0..4).map_err(|error| error.to_string())?;
        let mut number = [0.0];
        widen(dtype, &bytes, &mut number);
        // So that products and quotients with any scale of 8 bits are normal numbers.
        let sound = 2f32.powi(-100)..2f32.powi(100);
        if !sound.contains(&number[0]) {
            return Err(format!("has {name} of {:e}, which is no scale", number[0]));
        }
        Ok(number[0])
    }

    fn integers_in_bytes(mut self, scale: Stored) -> Result<Quantized, String> {
        self.companions.push(scale.tensor.name.clone());
        if let Some(bits) = other_width(self.checkpoint) {
            return Err(format!(
                "is stored in bytes, though config.json says that its integers have {bits} bits"
            ));
        }
        let shape = self.stored.tensor.shape.clone();
        self.integers(shape, scale, Codes::Integer { bits: 8, offset: 0 })
    }

    fn integers_in_words(mut self) -> Result<Quantized, String> {
        let scale = self.scale()?;
        let TensorInfo { name, shape, .. } = &self.stored.tensor;
        let Some(extents) = self.beside("_shape") else {
            return Err(format!("has no {}_shape beside it", self.parameter));
        };
        let logical = self.whole_numbers(&extents)?;
        let fits = |bits: u64| {
            let per_word = 32 / bits;
            let (Some((last, above)), Some((words, others))) =
                (logical.split_last(), shape.split_last())
            else {
                return false;
            };
            above == others && last.is_multiple_of(per_word) && last / per_word == *words
        };
        let bits = match (fits(4), fits(8)) {
            (true, _) => 4,
            (_, true) => 8,
            _ => {
                return Err(format!(
                    "has {name} of shape {shape:?}, which holds no {logical:?} integers of 4 or 8 \
                     bits in whole words ({})",
                    extents.tensor.name
                ));
            }
        };
        if let Some(order) = self.beside("_g_idx") {
            return Err(format!(
                "has scales in the order of activations ({}), which is not read",
                order.tensor.name
            ));
        }
        self.integers(logical, scale, Codes::Integer { bits, offset: 1 << (bits - 1) })
    }

    fn integers(
        mut self,
        shape: Vec<u64>,
        scale: Stored,
        codes: Codes,
    ) -> Result<Quantized, String> {
        if !scale.tensor.dtype.is_mergeable() {
            let TensorInfo { name, dtype, .. } = &scale.tensor;
            return Err(format!("has its scale {name} stored as {dtype}"));
        }
        if let Some(zeros) = self.beside("_zero_point") {
            let bytes = zeros
                .read(self.checkpoint, 0..zeros.tensor.bytes() as usize)
                .map_err(|error| error.to_string())?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Err(format!(
                    "has zero points ({}), which are not read: its integers are not symmetric",
                    zeros.tensor.name
                ));
            }
        }
        let (blocks, words) = fp8::blocks(self.checkpoint, &shape, &scale.tensor)?;
        let bits = if codes.is_packed() { 4 } else { 8 };
        let words = format!("integers of {bits} bits with a scale for {words}");
        Ok(self.finish(shape, codes, blocks, Scales::Plain(scale, Steps::All), words))
    }

    /// The whole numbers of a small tensor.
    fn whole_numbers(&self, stored: &Stored) -> Result<Vec<u64>, String> {
        let TensorInfo { name, dtype, .. } = &stored.tensor;
        let size = match dtype.name() {
            "I64" => 8,
            "I32" => 4,
            other => return Err(format!("has {name} stored as {other}")),
        };
        if stored.tensor.elements() > 8 {
            return Err(format!("has {name} of shape {:?}", stored.tensor.shape));
        }
        let bytes = stored
            .read(self.checkpoint, 0..stored.tensor.bytes() as usize)
            .map_err(|error| error.to_string())?;
        let numbers = bytes.chunks_exact(size).map(|bytes| {
            let mut wide = [0; 8];
            wide[..size].copy_from_slice(bytes);
            u64::from_le_bytes(wide)
        });
        let numbers: Vec<u64> = numbers.collect();
        // What no tensor has, among them negative ones.
        if numbers.iter().any(|number| *number > u64::from(u32::MAX) / 2) {
            return Err(format!("has {name} of {numbers:?}, which is no shape"));
        }
        Ok(numbers)
    }
}

/// The width of integers that the config names, where it names none of 8 bits.
fn other_width(checkpoint: &Checkpoint) -> Option<u64> {
    let groups = unsupported::quantization(checkpoint)?.get("config_groups")?.as_object()?;
    let width = |group: &Value| group.get("weights")?.get("num_bits")?.as_u64();
    let widths: Vec<u64> = groups.values().filter_map(width).collect();
    if widths.contains(&8) { None } else { widths.first().copied() }
}
