//! Weights as bitsandbytes quantises them and transformers saves them: NF4 and FP4 with a scale for
//! each run of weights, which may be quantised itself, and int8 with a scale for each row.

use serde_json::Value;

use super::blocks::Blocks;
use super::codes::{Codes, Map};
use super::scales::{Nested, Scales, Steps};
use super::{Quantized, Stored};
use crate::checkpoint::Checkpoint;
use crate::kernel::convert::widen;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;

const TYPES: [&str; 2] = ["nf4", "fp4"];

/// Reads the layout of packed codes; `None` for bytes that have no state beside them.
pub(super) fn read_four_bit(
    checkpoint: &Checkpoint,
    stored: &Stored,
) -> Option<Result<Quantized, String>> {
    let name = &stored.tensor.name;
    let (kind, state) = TYPES.iter().find_map(|kind| {
        let state = format!("{name}.quant_state.bitsandbytes__{kind}");
        Some((*kind, Stored::find(checkpoint, &state)?))
    })?;
    Some(four_bit(checkpoint, stored, kind, state))
}

/// The f32s of a small tensor.
fn values(checkpoint: &Checkpoint, stored: &Stored) -> Result<Vec<f32>, String> {
    let TensorInfo { name, dtype, .. } = &stored.tensor;
    if *dtype != Dtype::F32 {
        return Err(format!("has {name} stored as {dtype} instead of F32"));
    }
    let bytes = stored
        .read(checkpoint, 0..stored.tensor.bytes() as usize)
        .map_err(|error| error.to_string())?;
    let mut values = vec![0.0; bytes.len() / 4];
    widen(dtype, &bytes, &mut values);
    Ok(values)
}

fn four_bit(
    checkpoint: &Checkpoint,
    stored: &Stored,
    kind: &str,
    state: Stored,
) -> Result<Quantized, String> {
    let name = &stored.tensor.name;
    let beside = |leaf: &str| {
        Stored::find(checkpoint, &format!("{name}.{leaf}"))
            .ok_or_else(|| format!("has no {name}.{leaf} beside it"))
    };
    let bytes = state
        .read(checkpoint, 0..state.tensor.bytes() as usize)
        .map_err(|error| error.to_string())?;
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|error| format!("has a state that is no JSON ({error}): {}", state.tensor.name))?;
    let number = |key: &str| {
        json.get(key)
            .and_then(Value::as_u64)
            .filter(|number| *number > 0)
            .map(|number| number as usize)
            .ok_or_else(|| format!("has no {key} in {}", state.tensor.name))
    };
    let shape: Vec<u64> = json
        .get("shape")
        .and_then(Value::as_array)
        .map(|shape| shape.iter().filter_map(Value::as_u64).collect())
        .ok_or_else(|| format!("has no shape in {}", state.tensor.name))?;
    let elements = shape.iter().product::<u64>();
    if elements.div_ceil(2) != stored.tensor.bytes() {
        return Err(format!(
            "has {} bytes for the {elements} weights that {} names",
            stored.tensor.bytes(),
            state.tensor.name
        ));
    }
    let length = number("blocksize")?;
    if !length.is_multiple_of(2) {
        return Err(format!("has blocks of {length} weights"));
    }
    let map = beside("quant_map")?;
    let codes = values(checkpoint, &map)?;
    if codes.len() != 16 || codes.iter().any(|value| !value.is_finite()) {
        return Err(format!("has a {} that is not 16 numbers", map.tensor.name));
    }
    let blocks = Blocks::Runs { length, elements: elements as usize };
    let absmax = beside("absmax")?;
    if absmax.tensor.elements() != blocks.count() as u64 {
        return Err(format!(
            "has {} scales for its {} blocks in {}",
            absmax.tensor.elements(),
            blocks.count(),
            absmax.tensor.name
        ));
    }
    let mut companions =
        vec![absmax.tensor.name.clone(), map.tensor.name, state.tensor.name.clone()];
    let mut words = format!("4 bits (bitsandbytes {kind}) with a scale for every {length} weights");
    let scales = if absmax.tensor.dtype == Dtype::F32 {
        Scales::Plain(absmax, Steps::All)
    } else if absmax.tensor.dtype.name() == "U8" {
        let outer = beside("nested_absmax")?;
        let map = beside("nested_quant_map")?;
        let run = number("nested_blocksize")?;
        let code = values(checkpoint, &map)?;
        if code.len() != 256 || code.iter().any(|value| !value.is_finite()) {
            return Err(format!("has a {} that is not 256 numbers", map.tensor.name));
        }
        if outer.tensor.elements() != (blocks.count().div_ceil(run)) as u64
            || outer.tensor.dtype != Dtype::F32
        {
            return Err(format!("has a {} that does not fit its scales", outer.tensor.name));
        }
        let offset = json
            .get("nested_offset")
            .and_then(Value::as_f64)
            .ok_or_else(|| format!("has no nested_offset in {}", state.tensor.name))?;
        companions.extend([outer.tensor.name.clone(), map.tensor.name]);
        words.push_str(", which is quantised too");
        let map = Map::new(code);
        let offset = offset as f32;
        Scales::Nested(Box::new(Nested { codes: absmax, map, scales: outer, run, offset, state }))
    } else {
        return Err(format!("has {} stored as {}", absmax.tensor.name, absmax.tensor.dtype));
    };
    Ok(Quantized {
        logical: TensorInfo { dtype: Dtype::F32, shape, ..stored.tensor.clone() },
        stored: stored.clone(),
        codes: Codes::FourBit(Map::new(codes)),
        blocks,
        scales,
        companions,
        transposed: None,
        scheme: words,
    })
}

/// Reads the layout of int8 codes; `None` for integers without a scale for each row.
pub(super) fn read_int8(
    checkpoint: &Checkpoint,
    stored: &Stored,
) -> Option<Result<Quantized, String>> {
    let name = &stored.tensor.name;
    let module = name.strip_suffix(".weight")?;
    let scale = Stored::find(checkpoint, &format!("{module}.SCB"))?;
    let [height, width] = *stored.tensor.shape.as_slice() else {
        return Some(Err(format!("has shape {:?} instead of a matrix's", stored.tensor.shape)));
    };
    if scale.tensor.dtype != Dtype::F32 || scale.tensor.elements() != height {
        return Some(Err(format!("has a {} that does not fit its rows", scale.tensor.name)));
    }
    let mut companions = vec![scale.tensor.name.clone()];
    if let Some(format) = Stored::find(checkpoint, &format!("{module}.weight_format")) {
        let bytes = format.read(checkpoint, 0..format.tensor.bytes() as usize);
        match bytes {
            Ok(bytes) if bytes.iter().all(|byte| *byte == 0) => {}
            Ok(_) => {
                return Some(Err(format!(
                    "lies in the order of a graphics card's tiles ({}), not in rows; save it again \
                     with a newer bitsandbytes",
                    format.tensor.name
                )));
            }
            Err(error) => return Some(Err(error.to_string())),
        }
        companions.push(format.tensor.name);
    }
    Some(Ok(Quantized {
        logical: TensorInfo { dtype: Dtype::F32, ..stored.tensor.clone() },
        stored: stored.clone(),
        codes: Codes::Int8,
        blocks: Blocks::Grid {
            height: height as usize,
            width: width as usize,
            block_height: 1,
            block_width: (width as usize).max(1),
            matrices: 1,
        },
        scales: Scales::Plain(scale, Steps::All),
        companions,
        transposed: None,
        scheme: "8 bits (bitsandbytes int8) with a scale for each row".into(),
    }))
}
