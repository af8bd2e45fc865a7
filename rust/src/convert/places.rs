//! Which modules a format has names for: not every one has a component for all that was trained, or a
//! name for every layer.

use std::collections::HashSet;

use super::naming::ATTENTION;
use super::targets::{Names, Target, some};
use crate::adapter::factors::values;
use crate::adapter::formats::write_parts::xlabs;
use crate::adapter::{Adapter, Module, grammar};
use crate::checkpoint::components::ComponentKind;
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::error::{Error, Result};

/// What of an adapter's modules a format has no names for.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The keys of modules that are left out whole.
    without: HashSet<String>,
    /// Modules of text encoders, where there is no place for these.
    text_encoders: Vec<String>,
    /// Modules, or rows of an MLP in them, without a name.
    unnamed: Vec<String>,
}

impl Places {
    /// Of an adapter that has the names of its base, where there is one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where nothing of it is of the family whose names the format has;
    /// [`Error::Io`], or that a file changed meanwhile.
    pub fn of(adapter: &Adapter, target: &Target, names: Option<&DiffusionNames>) -> Result<Self> {
        let mut places = Self::default();
        if target.holds.text_encoders {
            return Ok(places);
        }
        let mut has_blocks = false;
        for (key, module) in adapter.modules() {
            let (kind, body, slot) = original(module, names);
            if matches!(kind, Some(kind) if kind != ComponentKind::Denoiser) {
                places.text_encoders.push(module.title().into_owned());
                places.without.insert(key.clone());
                continue;
            }
            has_blocks |= BLOCKS.iter().any(|block| body.starts_with(block));
            if target.names != Names::XLabs {
                continue;
            }
            let is_mlp = slot.is_some_and(|slot| slot >= ATTENTION);
            // A part that its reader makes of the fused layer is called by its number.
            let is_part = names.is_none() && is_numbered(&body);
            if is_mlp || xlabs::layer(&body).is_none() && !is_part {
                places.unnamed.push(module.title().into_owned());
                places.without.insert(key.clone());
            } else if slot.is_none() && body.ends_with(FUSED) && changes_the_mlp(module)? {
                places.unnamed.push(format!("the rows of the MLP in {}", module.title()));
            }
        }
        if has_blocks || adapter.modules().is_empty() {
            return Ok(places);
        }
        Err(Error::unsupported(
            adapter.path(),
            format!(
                "changes no block in the names of Flux's authors (double_blocks, single_blocks), which alone \
                 the format {} has{}",
                target.name,
                if names.is_none() {
                    "; give the base (base=, --base) where it names them otherwise"
                } else {
                    ""
                }
            ),
        ))
    }

    /// Whether the format has a name for a module.
    pub fn has(&self, module: &Module) -> bool {
        !self.without.contains(&module.key)
    }

    /// What it has none for, in words.
    pub fn left_out(&self, target: &Target) -> Vec<String> {
        let mut lost = Vec::new();
        if !self.text_encoders.is_empty() {
            lost.push(format!("updates of text encoders ({})", some(&self.text_encoders)));
        }
        if !self.unnamed.is_empty() {
            lost.push(format!(
                "updates of layers that {} has no names for ({})",
                target.name,
                some(&self.unnamed)
            ));
        }
        lost
    }
}

/// The blocks of Flux in its authors' names.
const BLOCKS: [&str; 2] = ["double_blocks.", "single_blocks."];
/// The layer in which they fuse q, k, v and an MLP.
const FUSED: &str = ".linear1";

/// All that they fuse.
const FUSED_LAYERS: [&str; 2] = [".qkv", FUSED];

/// A module's component, its name there as the model's author has it, and which part of that it is.
fn original(
    module: &Module,
    names: Option<&DiffusionNames>,
) -> (Option<ComponentKind>, String, Option<usize>) {
    let Some(names) = names else {
        let (kind, body) = grammar::component_of(&module.path);
        return (kind, body.to_owned(), None);
    };
    let canonical = names.canonical(&format!("{}.weight", module.path));
    let full = canonical.and_then(|found| found.name.rsplit_once('.')).map(|(module, _)| module);
    let slot = canonical.and_then(|found| Some(found.slice.as_ref()?.slot));
    let component = names.component_of(&module.path);
    let full = full.unwrap_or(&module.path);
    let prefix = component.map_or("", |component| component.prefix.as_str());
    let body = full.strip_prefix(prefix).unwrap_or(full).to_owned();
    (component.map(|component| component.kind), body, slot)
}

/// Whether a name is that of a part of a fused layer, by its number: `single_blocks.0.linear1.2`.
fn is_numbered(body: &str) -> bool {
    let Some((layer, number)) = body.rsplit_once('.') else { return false };
    number.parse::<u32>().is_ok() && FUSED_LAYERS.iter().any(|fused| layer.ends_with(fused))
}

/// Whether only a base tells what a target calls the module that has a name with dots, or which rows of
/// it have a name there.
pub(super) fn needs_base(adapter: &Adapter, body: &str, target: &Target) -> bool {
    match target.names {
        Names::XLabs => body.ends_with(FUSED) || is_numbered(body),
        Names::OneTrainer => is_numbered(body),
        _ => is_numbered(body) && adapter.format() != target.name,
    }
}

/// Whether a layer in which q, k, v and an MLP are fused, each of the first as wide as its inputs, changes
/// the MLP. Of what is no plain product it is taken for granted.
fn changes_the_mlp(module: &Module) -> Result<bool> {
    let attention = module.inputs() * ATTENTION as u64;
    if module.outputs() <= attention {
        return Ok(false);
    }
    let Some((_, up)) = module.delta.plain() else { return Ok(true) };
    let start = (attention * up.shape[1..].iter().product::<u64>()) as usize;
    Ok(values(up)?[start..].iter().any(|value| *value != 0.0))
}

/// Whether an adapter's flattened names are the target's own as they are. Which dots they had, and so
/// what another format calls them, only a base tells.
pub(super) fn keeps_flattened(adapter: &Adapter, path: &str, target: &Target) -> bool {
    const KOHYA: [&str; 3] = ["lora_unet_", "lora_te", "lora_prior_"];
    let is_same = adapter.format() == target.name;
    is_same && target.is_flattened
        || target.names == Names::Kohya && KOHYA.iter().any(|prefix| path.starts_with(prefix))
}
