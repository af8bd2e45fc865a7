//! Layers by number, as cloneofsimo's lora has them: the n-th linear layer of the attention and the
//! feed-forward modules of a UNet, in the order in which these are registered, and the n-th of CLIP's
//! attention.
//!
//! The order is diffusers': `down_blocks`, `up_blocks`, `mid_block`, within a block `attn1`, `ff`, `attn2` or
//! `attn1`, `attn2`, `ff`, by its release. The shapes of all layers tell which, or that it is none.

use std::collections::{BTreeMap, HashMap};

use indexmap::IndexMap;

use crate::adapter::{Adapter, Grammar, Module};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::components::ComponentKind;
use crate::checkpoint::names::diffusion::{ComponentNames, DiffusionNames, Scheme};
use crate::error::{Error, Result};

/// The layers of attention in a UNet, and in CLIP, as they are registered.
const ATTENTION: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];
const CLIP: [&str; 4] = ["k_proj", "v_proj", "q_proj", "out_proj"];
const FEED_FORWARD: &str = "ff.net.0.proj";
/// The parts of a UNet as they are registered.
const BLOCKS: [&str; 3] = ["down_blocks.", "up_blocks.", "mid_block."];
/// What a UNet's transformer blocks have, and CLIP's layers.
const IN_BLOCK: &str = ".attn1.to_q";
const IN_LAYER: &str = ".self_attn.k_proj";
/// The orders within a block of which a file is in one.
const ORDERS: [&[&str]; 3] =
    [&["attn1", "ff", "attn2"], &["attn1", "attn2", "ff"], &["attn1", "attn2"]];

/// The adapter with the names of the base's layers.
///
/// # Errors
/// [`Error::Adapter`] if the base has no order in which the layers are of these shapes.
pub(super) fn resolve(
    adapter: &Adapter,
    base: &Checkpoint,
    names: Option<&DiffusionNames>,
) -> Result<Adapter> {
    let mut numbered = BTreeMap::<&str, BTreeMap<u32, &Module>>::new();
    for module in adapter.modules().values() {
        let Some((component, number)) = module.path.rsplit_once(':') else { continue };
        let Ok(number) = number.parse() else { continue };
        numbered.entry(component).or_default().insert(number, module);
    }
    let mut found = HashMap::new();
    for (component, modules) in &numbered {
        let failed = |why: &str| {
            Error::adapter(
                adapter.path(),
                format!(
                    "numbers the {} layers of its {component} and does not name them (cloneofsimo's \
                     format); {why}",
                    modules.len()
                ),
            )
        };
        let names = names.ok_or_else(|| {
            failed(
                "only a UNet or a CLIP text encoder of diffusers' tells which they are: give \
                    such a base",
            )
        })?;
        let is_text = component.starts_with("text_encoder");
        let scheme = (names.components().iter())
            .filter(|own| is_asked_for(own, is_text))
            .flat_map(|own| &own.schemes)
            .find(|scheme| scheme.modules().any(|(name, _)| is_in_order(name, is_text)));
        let scheme = scheme.ok_or_else(|| failed("the base has no such component"))?;
        let mut fitting = Vec::<Vec<String>>::new();
        for order in orders(scheme, is_text) {
            let fits = order.len() == modules.len()
                && order.iter().enumerate().all(|(number, full)| {
                    u32::try_from(number)
                        .ok()
                        .and_then(|number| modules.get(&number))
                        .is_some_and(|module| shape_of(base, names, full) == Some(shape(module)))
                });
            if fits && !fitting.contains(&order) {
                fitting.push(order);
            }
        }
        match fitting.as_slice() {
            [only] => {
                for (module, full) in modules.values().zip(only) {
                    found.insert(module.key.clone(), full.clone());
                }
            }
            [] => {
                return Err(failed(
                    "in no order in which diffusers ever registered the layers of the base are they of \
                     these shapes: it was trained on another model, or on other classes of layers",
                ));
            }
            _ => return Err(failed("the base has several orders of such layers")),
        }
    }
    let mut modules = IndexMap::with_capacity(adapter.modules().len());
    for (key, module) in adapter.modules() {
        let path = found.remove(key.as_str()).unwrap_or_else(|| module.path.clone());
        modules.insert(key.clone(), Module { path, ..module.clone() });
    }
    let (saved, rows) = (adapter.saved().to_vec(), adapter.trained_rows().to_vec());
    Ok(adapter.renamed(modules, saved, rows, Grammar::Dotted))
}

fn is_asked_for(component: &ComponentNames, is_text: bool) -> bool {
    match component.kind {
        ComponentKind::TextEncoder(number) => is_text && number == 1,
        ComponentKind::Denoiser => !is_text,
        ComponentKind::Vae | ComponentKind::Other => false,
    }
}

/// Whether a name is one by which the order is known: diffusers' or transformers' own.
fn is_in_order(name: &str, is_text: bool) -> bool {
    name.ends_with(inner(is_text)) && (is_text || name.starts_with(BLOCKS[0]))
}

fn inner(is_text: bool) -> &'static str {
    if is_text { IN_LAYER } else { IN_BLOCK }
}

/// Every order in which the layers may have been counted, by their full names.
fn orders(scheme: &Scheme, is_text: bool) -> Vec<Vec<String>> {
    let mut blocks: Vec<&str> =
        scheme.modules().filter_map(|(name, _)| name.strip_suffix(inner(is_text))).collect();
    blocks.sort_by_key(|block| {
        let part = BLOCKS.iter().position(|part| block.starts_with(part));
        (part, numbers_of(block))
    });
    let full = |name: String| scheme.module(&name, false).map(str::to_owned);
    let of_attention = |attention: String, layers: [&'static str; 4]| {
        layers.into_iter().map(move |layer| format!("{attention}.{layer}"))
    };
    if is_text {
        let layers =
            blocks.iter().flat_map(|block| of_attention(format!("{block}.self_attn"), CLIP));
        return layers.map(full).collect::<Option<Vec<_>>>().into_iter().collect();
    }
    let in_order = |order: &[&str]| {
        let mut layers = Vec::new();
        for block in &blocks {
            for part in order {
                match *part {
                    "ff" => layers.push(format!("{block}.{FEED_FORWARD}")),
                    attention => {
                        layers.extend(of_attention(format!("{block}.{attention}"), ATTENTION));
                    }
                }
            }
        }
        layers.into_iter().map(full).collect::<Option<Vec<_>>>()
    };
    ORDERS.iter().filter_map(|order| in_order(order)).collect()
}

/// The numbers in a name, by which blocks are in their order.
fn numbers_of(name: &str) -> Vec<u64> {
    name.split('.').filter_map(|part| part.parse().ok()).collect()
}

fn shape(module: &Module) -> [u64; 2] {
    [module.outputs(), module.inputs()]
}

/// The outputs and inputs of the layer of that name in the base.
fn shape_of(base: &Checkpoint, names: &DiffusionNames, full: &str) -> Option<[u64; 2]> {
    let parameter = format!("{full}.weight");
    let (tensor, parts) = match base.tensor(&parameter) {
        Some(tensor) => (tensor, 1),
        None => {
            let found = names.canonical(&parameter)?;
            (base.tensor(&found.name)?, found.slice.as_ref().map_or(1, |slice| slice.slots))
        }
    };
    let (outputs, inputs) = tensor.shape.split_first()?;
    Some([outputs / parts as u64, inputs.iter().product()])
}
