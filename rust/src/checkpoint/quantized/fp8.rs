//! Weights of 8-bit floats: with a scale for each block (DeepSeek-V3, Qwen3-FP8), for each row
//! (compressed-tensors, FBGEMM) or for all (compressed-tensors, ModelOpt), or with none.

use serde_json::{Map, Value};

use super::blocks::Blocks;
use super::codes::Codes;
use super::scales::{Scales, Steps};
use super::{Quantized, Stored, unsupported};
use crate::checkpoint::Checkpoint;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;

/// Names of the scale, after the weight's own and after its module's.
const AFTER_WEIGHT: [&str; 2] = ["_scale_inv", "_scale"];
const AFTER_MODULE: [&str; 2] = [".scale", ".scale_weight"];
/// What else a quantised module has, for its activations and its cache.
const ATTACHMENTS: [&str; 8] = [
    "input_scale",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
    "scale_input",
];

/// Reads a weight's layout; the reason, where it cannot be told.
pub(super) fn read(checkpoint: &Checkpoint, stored: &Stored) -> Option<Result<Quantized, String>> {
    let name = &stored.tensor.name;
    let module = name.strip_suffix(".weight");
    let after_weight = AFTER_WEIGHT.iter().map(|ending| format!("{name}{ending}"));
    let after_module = AFTER_MODULE.iter().filter_map(|end| Some(format!("{}{end}", module?)));
    let scale = after_weight.chain(after_module).find_map(|name| Stored::find(checkpoint, &name));
    let codes = match stored.tensor.dtype.name() {
        "F8_E4M3" => Codes::E4m3,
        _ => Codes::E5m2,
    };
    let type_name = match codes {
        Codes::E4m3 => "fp8 (E4M3)",
        _ => "fp8 (E5M2)",
    };
    let logical = TensorInfo { dtype: Dtype::F32, ..stored.tensor.clone() };
    let Some(scale) = scale else {
        let config = unsupported::quantization(checkpoint);
        if let Some(method) = config.and_then(|config| config.get("quant_method")?.as_str())
            && module.is_some()
        {
            return Some(Err(format!(
                "is stored as {} without a scale that is known here, though config.json says that \
                 the base is quantised ({method})",
                stored.tensor.dtype
            )));
        }
        let width = stored.tensor.shape.last().map_or(1, |extent| *extent as usize).max(1);
        let height = (stored.tensor.elements() as usize / width).max(1);
        let blocks =
            Blocks::Grid { height, width, block_height: 1, block_width: width, matrices: 1 };
        return Some(Ok(Quantized {
            logical,
            stored: stored.clone(),
            codes,
            blocks,
            scales: Scales::None,
            companions: Vec::new(),
            transposed: None,
            scheme: format!("{type_name} without scales"),
        }));
    };
    let scale_name = scale.tensor.name.clone();
    let layout = steps(checkpoint, &scale).and_then(|steps| {
        blocks(checkpoint, &stored.tensor.shape, &scale.tensor).map(|blocks| (steps, blocks))
    });
    let (steps, (blocks, words)) = match layout {
        Ok(layout) => layout,
        Err(problem) => return Some(Err(problem)),
    };
    let mut companions = vec![scale_name];
    let module = module.unwrap_or(name);
    companions.extend(
        (ATTACHMENTS.iter())
            .flat_map(|leaf| [format!("{module}.{leaf}"), format!("{name}_{leaf}")])
            .filter(|name| checkpoint.tensor(name).is_some()),
    );
    let powers = if steps == Steps::All { "" } else { ", a power of two," };
    Some(Ok(Quantized {
        logical,
        stored: stored.clone(),
        codes,
        blocks,
        scales: Scales::Plain(scale, steps),
        companions,
        transposed: None,
        scheme: format!("{type_name} with a scale{powers} for {words}"),
    }))
}

fn steps(checkpoint: &Checkpoint, scale: &Stored) -> Result<Steps, String> {
    let says = |key: &str, value: &str| {
        let config = unsupported::quantization(checkpoint);
        config.and_then(|config| config.get(key)?.as_str()).is_some_and(|text| text == value)
    };
    match &scale.tensor.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 if says("scale_fmt", "ue8m0") => {
            Ok(Steps::PowersOfTwo)
        }
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => Ok(Steps::All),
        // MXFP8 keeps the exponents as plain bytes.
        Dtype::Other(name) if matches!(&**name, "F8_E8M0" | "U8") => Ok(Steps::Exponents),
        other => Err(format!("has its scale {} stored as {other}", scale.tensor.name)),
    }
}

/// The block size that the config names, rows before columns.
fn named_size(checkpoint: &Checkpoint) -> Option<(usize, usize)> {
    fn pair(value: &Value) -> Option<(usize, usize)> {
        let [rows, columns] = value.as_array()?.as_slice() else { return None };
        Some((rows.as_u64()? as usize, columns.as_u64()? as usize))
    }
    fn of_group(config: &Map<String, Value>) -> Option<(usize, usize)> {
        let groups = config.get("config_groups")?.as_object()?;
        groups.values().find_map(|group| pair(group.get("weights")?.get("block_structure")?))
    }
    let config = unsupported::quantization(checkpoint)?;
    config.get("weight_block_size").and_then(pair).or_else(|| of_group(config))
}

/// Which weights share a scale, from the shapes of both: as the config says, else in equal parts.
pub(super) fn blocks(
    checkpoint: &Checkpoint,
    shape: &[u64],
    scale: &TensorInfo,
) -> Result<(Blocks, String), String> {
    let extents: Vec<usize> = shape.iter().map(|extent| *extent as usize).collect();
    let (leading, height, width) = match extents.as_slice() {
        [] => (&[][..], 1, 1),
        [width] => (&[][..], 1, *width),
        [leading @ .., height, width] => (leading, *height, *width),
    };
    let matrices: usize = leading.iter().product();
    let mut grid: Vec<usize> = scale.shape.iter().map(|extent| *extent as usize).collect();
    let refuse = || {
        Err(format!(
            "has a scale {} of shape {:?}, which does not fit {shape:?}",
            scale.name, scale.shape
        ))
    };
    let whole = |count: usize| {
        let blocks = Blocks::Grid {
            height,
            width,
            block_height: height.max(1),
            block_width: width.max(1),
            matrices,
        };
        let words = if count == 1 { "each tensor" } else { "each matrix" };
        Ok((blocks, words.to_owned()))
    };
    if scale.elements() == 1 {
        // One for all, whatever the dimensions: as one matrix.
        let blocks = Blocks::Grid {
            height: matrices * height,
            width,
            block_height: (matrices * height).max(1),
            block_width: width.max(1),
            matrices: 1,
        };
        let words = match named_size(checkpoint).filter(|_| grid.len() > 1) {
            Some((high, wide)) => format!("each block of {high} × {wide}"),
            None => "each tensor".into(),
        };
        return Ok((blocks, words));
    }
    if grid == leading && matrices > 1 {
        return whole(matrices);
    }
    if grid == [height] && leading.is_empty() {
        grid.push(1);
    }
    let [above @ .., rows, columns] = grid.as_slice() else { return refuse() };
    let (rows, columns) = (*rows, *columns);
    if above != leading || rows == 0 || columns == 0 {
        return refuse();
    }
    let named = named_size(checkpoint).filter(|(high, wide)| {
        *high > 0 && *wide > 0 && height.div_ceil(*high) == rows && width.div_ceil(*wide) == columns
    });
    let (block_height, block_width) = match named {
        Some(size) => size,
        None if height % rows == 0 && width % columns == 0 => (height / rows, width / columns),
        None if height.div_ceil(128) == rows && width.div_ceil(128) == columns => (128, 128),
        None => return refuse(),
    };
    let words = match (block_height == height, block_width == width) {
        (true, true) => "each matrix".to_owned(),
        (_, true) if block_height == 1 => "each row".to_owned(),
        (true, _) if block_width == 1 => "each column".to_owned(),
        _ if block_height == 1 => format!("every {block_width} weights of a row"),
        _ => format!("each block of {block_height} × {block_width}"),
    };
    Ok((Blocks::Grid { height, width, block_height, block_width, matrices }, words))
}
