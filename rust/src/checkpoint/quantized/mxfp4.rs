//! Experts in MXFP4 as gpt-oss is published: floats of 4 bits in runs of 32 that share an exponent
//! (OCP Microscaling Formats, 2023), each expert's matrix transposed against the model's own.

use super::blocks::Blocks;
use super::codes::Codes;
use super::scales::{Scales, Steps};
use super::transposed::Transposed;
use super::{Quantized, Stored};
use crate::checkpoint::Checkpoint;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;

const CODES: &str = "_blocks";
const SCALES: &str = "_scales";
/// Codes that share a scale.
const RUN: u64 = 32;

/// The name of the parameter whose codes a tensor holds.
pub(super) fn parameter(checkpoint: &Checkpoint, name: &str) -> Option<String> {
    let parameter = name.strip_suffix(CODES)?;
    checkpoint.tensor(&format!("{parameter}{SCALES}")).map(|_| parameter.to_owned())
}

/// Reads the layout of a parameter's codes: (experts, outputs, inputs / 32, 16), of which the model
/// makes (experts, inputs, outputs).
pub(super) fn read(
    checkpoint: &Checkpoint,
    stored: &Stored,
    parameter: &str,
) -> Result<Quantized, String> {
    let TensorInfo { name, dtype, shape, .. } = &stored.tensor;
    let scales = Stored::find(checkpoint, &format!("{parameter}{SCALES}"))
        .ok_or_else(|| format!("has no {parameter}{SCALES} beside it"))?;
    let &[experts, outputs, runs, bytes] = shape.as_slice() else {
        return Err(format!(
            "has its codes in {name} of shape {shape:?} instead of (experts, outputs, inputs / 32, 16)"
        ));
    };
    if dtype.name() != "U8" || bytes * 2 != RUN {
        return Err(format!(
            "has its codes in {name} as {dtype} of shape {shape:?} instead of runs of 16 bytes"
        ));
    }
    if scales.tensor.dtype.name() != "U8" || scales.tensor.shape != shape[..3] {
        return Err(format!(
            "has its scales in {} as {} of shape {:?} instead of U8 of shape {:?}",
            scales.tensor.name,
            scales.tensor.dtype,
            scales.tensor.shape,
            &shape[..3]
        ));
    }
    let inputs = runs * RUN;
    let companions = vec![scales.tensor.name.clone()];
    Ok(Quantized {
        logical: TensorInfo {
            name: parameter.to_owned(),
            dtype: Dtype::F32,
            shape: vec![experts, inputs, outputs],
            ..stored.tensor.clone()
        },
        stored: stored.clone(),
        codes: Codes::E2m1,
        blocks: Blocks::Grid {
            height: outputs as usize,
            width: inputs as usize,
            block_height: 1,
            block_width: RUN as usize,
            matrices: experts as usize,
        },
        scales: Scales::Plain(scales, Steps::Exponents),
        companions,
        transposed: Some(Transposed::new(vec![experts, outputs, inputs])),
        scheme: format!("MXFP4 with a scale, a power of two, for every {RUN} weights"),
    })
}
