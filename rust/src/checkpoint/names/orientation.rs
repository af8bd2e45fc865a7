//! The orientation in which a weight is stored: (out, in) as torch's linear layers, or (in, out) as
//! the Conv1D of GPT-2 and its relatives.
//!
//! The adapter's own flag is often wrong, so the shapes decide. Where the weight is square they
//! cannot, and the architecture does.

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::tensor::orientation::Orientation;

/// Model types of transformers whose layers are Conv1D.
const CONV1D_MODELS: [&str; 5] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"];
/// The names of those layers in them.
const CONV1D_LAYERS: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];

/// The orientation of the weight of `module`, of `shape` (two extents), for an update that maps
/// `inputs` to `outputs`.
///
/// # Errors
/// In words, where the shape does not fit or nothing tells which way a square weight lies.
pub fn decide(
    base: &Checkpoint,
    module: &str,
    shape: &[u64],
    (outputs, inputs): (u64, u64),
    flag: bool,
) -> Result<Orientation, String> {
    let straight = shape == [outputs, inputs];
    let transposed = shape == [inputs, outputs];
    match (straight, transposed) {
        (true, false) => Ok(Orientation::OutIn),
        // Transposed on a layer that nothing says is stored so, it is another layer's update.
        (false, true) if may_be_transposed(base, module, outputs, flag) => Ok(Orientation::InOut),
        (false, _) => Err(format!(
            "its module {module} updates a weight of shape [{outputs}, {inputs}], \
             but the base's is {shape:?}"
        )),
        (true, true) => decide_square(base, module, flag),
    }
}

/// Whether the weight of a module is stored (in, out) as Conv1D's, by its name and what the base says.
pub fn is_conv1d(base: &Checkpoint, module: &str) -> bool {
    let layer = module.rsplit('.').next().unwrap_or(module);
    CONV1D_LAYERS.contains(&layer)
        && match base.config_of(module) {
            Some(config) => names_conv1d_model(config),
            None => siblings(base) == Some(Orientation::InOut),
        }
}

fn may_be_transposed(base: &Checkpoint, module: &str, outputs: u64, flag: bool) -> bool {
    let layer = module.rsplit('.').next().unwrap_or(module);
    // A layer's bias is as long as its output. PEFT's flag is that of the last layer it adapted, so
    // that in a model of both kinds it is wrong for one of them.
    let bias = base.tensor(&format!("{module}.bias"));
    flag || CONV1D_LAYERS.contains(&layer)
        || base.config_of(module).is_none_or(names_conv1d_model)
        || bias.is_some_and(|bias| bias.shape == [outputs])
}

/// The orientation of a weight whose shape does not tell it.
///
/// # Errors
/// In words, where nothing else does.
pub fn decide_square(base: &Checkpoint, module: &str, flag: bool) -> Result<Orientation, String> {
    let layer = module.rsplit('.').next().unwrap_or(module);
    let may_be_conv1d = CONV1D_LAYERS.contains(&layer);
    if may_be_conv1d {
        if base.config_of(module).is_some_and(names_conv1d_model) {
            return Ok(Orientation::InOut);
        }
        if let Some(orientation) = siblings(base) {
            return Ok(orientation);
        }
    }
    if base.config_of(module).is_some() || !(may_be_conv1d || flag) {
        return Ok(Orientation::OutIn);
    }
    Err(format!(
        "its module {module} has a square weight, and nothing tells whether the base stores it \
         (out, in) or, as GPT-2's Conv1D, (in, out); put the base's config.json beside its weights"
    ))
}

/// Whether the config, or a part of it, is of a model made of Conv1D layers.
fn names_conv1d_model(config: &serde_json::Map<String, Value>) -> bool {
    let own = config.get("model_type").and_then(Value::as_str);
    own.is_some_and(|name| CONV1D_MODELS.contains(&name))
        || config.values().filter_map(Value::as_object).any(names_conv1d_model)
}

/// What the base's other weights under Conv1D's names say: a bias is as long as the output.
fn siblings(base: &Checkpoint) -> Option<Orientation> {
    base.tensors().keys().find_map(|name| {
        let module = name.strip_suffix(".weight")?;
        let layer = module.rsplit('.').next()?;
        if !CONV1D_LAYERS.contains(&layer) {
            return None;
        }
        let [first, second] = base.tensor(name)?.shape.as_slice() else {
            return None;
        };
        let [bias] = base.tensor(&format!("{module}.bias"))?.shape.as_slice() else {
            return None;
        };
        match (first == second, bias == first, bias == second) {
            (false, true, _) => Some(Orientation::OutIn),
            (false, _, true) => Some(Orientation::InOut),
            _ => None,
        }
    })
}
