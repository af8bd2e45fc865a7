//! Names of modules that training tools put around a model's own, and paths without them.
//!
//! `torch.compile`, FSDP, activation checkpointing and DistributedDataParallel each wrap a module in
//! one of their own, whose name then stands in the paths of all that lies within:
//! `model.layers.0._checkpoint_wrapped_module.mlp.up_proj`. The model without the tool has no such
//! module.

use std::borrow::Cow;
use std::collections::HashSet;

use crate::checkpoint::Checkpoint;
use crate::limits;

/// Names that only tools give, and the tool of each.
const PRIVATE: [(&str, &str); 5] = [
    ("_orig_mod", "torch.compile"),
    ("_fsdp_wrapped_module", "FSDP"),
    ("_fpw_module", "FSDP"),
    ("_checkpoint_wrapped_module", "activation checkpointing"),
    ("_forward_module", "Lightning Fabric"),
];
/// The name that DistributedDataParallel, DataParallel and DeepSpeed give, and some models as well.
const COMMON: &str = "module";
/// The most parts called [`COMMON`] of one path of which each may be the model's own.
const UNDECIDED: usize = 6;

/// Whether a part of a path is one that a tool puts there.
pub fn is_wrapper(part: &str) -> bool {
    part == COMMON || is_private(part)
}

fn is_private(part: &str) -> bool {
    PRIVATE.iter().any(|(name, _)| *name == part)
}

/// A dotted path without all that tools put into it, at its front, in its middle and at its end.
///
/// A model's own module can be called `module`, too, which only its checkpoint tells:
/// [`Wrappers::strip`].
pub fn strip(path: &str) -> Cow<'_, str> {
    without(path, is_wrapper)
}

/// A path whose dots are underscores, without the names that only tools give.
pub fn strip_flattened(path: &str) -> Cow<'_, str> {
    let mut stripped = Cow::Borrowed(path);
    for (name, _) in PRIVATE {
        let part = format!("{name}_");
        if stripped.contains(&part) {
            stripped = Cow::Owned(stripped.replace(&part, ""));
        }
    }
    stripped
}

/// The tools that a part of a path tells of, in words.
pub fn tool_of(part: &str) -> &'static str {
    let private = PRIVATE.iter().find(|(name, _)| *name == part);
    private.map_or("DistributedDataParallel or DeepSpeed", |(_, tool)| tool)
}

/// A dotted path without the parts of which that holds.
fn without(path: &str, is_left_out: impl Fn(&str) -> bool) -> Cow<'_, str> {
    if !path.split('.').any(&is_left_out) {
        return Cow::Borrowed(path);
    }
    let kept: Vec<_> = path.split('.').filter(|part| !is_left_out(part)).collect();
    Cow::Owned(kept.join("."))
}

/// Which parts of paths are tools', by what a base has.
#[derive(Debug, Default)]
pub struct Wrappers<'a> {
    /// The names of a base of which some have such parts themselves.
    own: Option<OwnNames<'a>>,
}

/// A base's names, to be asked for parts of them.
#[derive(Debug)]
struct OwnNames<'a> {
    /// The wrappers' names that stand in them.
    wrappers: HashSet<&'a str>,
    /// All names, sorted.
    names: Vec<&'a str>,
    /// The names and what follows each of their dots, sorted.
    ends: Vec<&'a str>,
}

impl<'a> Wrappers<'a> {
    /// By the names of that base; without one, each name that tools give is one.
    pub fn of(base: Option<&'a Checkpoint>) -> Self {
        let names = base.into_iter().flat_map(|base| base.tensors().keys().map(String::as_str));
        Self::of_names(names)
    }

    fn of_names(names: impl Iterator<Item = &'a str> + Clone) -> Self {
        let parts = names.clone().flat_map(|name| name.split('.'));
        let wrappers: HashSet<_> = parts.filter(|part| is_wrapper(part)).collect();
        if wrappers.is_empty() {
            return Self::default();
        }
        let ends = |name: &'a str| {
            let cuts = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
            std::iter::once(name).chain(cuts)
        };
        let mut ends: Vec<_> = names.clone().flat_map(ends).collect();
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        ends.sort_unstable();
        Self { own: Some(OwnNames { wrappers, names, ends }) }
    }

    /// A path of a module or parameter without what tools put into it. What the base has as it is,
    /// but for a leading part, stays as it is; else as little is left out as makes it one of the
    /// base's.
    pub fn strip<'p>(&self, path: &'p str) -> Cow<'p, str> {
        let Some(own) = &self.own else { return strip(path) };
        let parts: Vec<_> = path.split('.').collect();
        let can_be_own = |index: &usize| own.wrappers.contains(parts[*index]);
        let undecided: Vec<_> = (0..parts.len()).filter(can_be_own).collect();
        if undecided.is_empty() || undecided.len() > UNDECIDED {
            return strip(path);
        }
        let mut choices: Vec<u32> = (0..1 << undecided.len()).collect();
        choices.sort_by_key(|left_out| left_out.count_ones());
        for left_out in choices {
            let is_kept = |(index, part): &(usize, &&str)| match undecided
                .iter()
                .position(|undecided| undecided == index)
            {
                Some(position) => left_out & (1 << position) == 0,
                None => !is_wrapper(part),
            };
            let kept: Vec<&str> =
                parts.iter().enumerate().filter(is_kept).map(|(_, part)| *part).collect();
            let candidate = kept.join(".");
            if own.has(&candidate) {
                return Cow::Owned(candidate);
            }
        }
        strip(path)
    }
}

impl OwnNames<'_> {
    /// Whether there is anything under a path, as it stands or under a leading part, or but for a
    /// leading part of its own that is no wrapper's.
    fn has(&self, path: &str) -> bool {
        if begins_one(&self.ends, path) {
            return true;
        }
        for (dot, _) in path.match_indices('.').take(limits::LEADING_PARTS) {
            let part = path[..dot].rsplit('.').next().unwrap_or_default();
            if is_wrapper(part) {
                return false;
            }
            if begins_one(&self.names, &path[dot + 1..]) {
                return true;
            }
        }
        false
    }
}

/// Whether one of the sorted names is that path, or lies under it.
fn begins_one(sorted: &[&str], path: &str) -> bool {
    let inner = format!("{path}.");
    let from = |text: &str| sorted.partition_point(|name| *name < text);
    sorted.get(from(path)).is_some_and(|name| *name == path)
        || sorted.get(from(&inner)).is_some_and(|name| name.starts_with(&inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_left_out_wherever_they_stand() {
        for (path, stripped) in [
            ("model.layers.0.q_proj", "model.layers.0.q_proj"),
            ("module.model.layers.0.q_proj", "model.layers.0.q_proj"),
            ("module.module.model.q_proj", "model.q_proj"),
            ("model._orig_mod.layers.0._orig_mod.q_proj", "model.layers.0.q_proj"),
            ("_fsdp_wrapped_module._fpw_module.a._checkpoint_wrapped_module.q", "a.q"),
            ("a.q._orig_mod.module", "a.q"),
            ("a.modules.module_list.q", "a.modules.module_list.q"),
        ] {
            assert_eq!(strip(path), stripped, "{path}");
            assert_eq!(Wrappers::default().strip(path), stripped, "{path}");
        }
        assert_eq!(strip_flattened("lora_unet__orig_mod_a_0__orig_mod_b"), "lora_unet_a_0_b");
        assert_eq!(strip_flattened("lora_unet_module_a"), "lora_unet_module_a");
    }

    #[test]
    fn what_the_base_has_is_its_own() {
        let names = [
            "model.encoder.module.layers.0.q.weight",
            "model.encoder.module.layers.0.experts.gate_up",
            "model.head.weight",
            "model.head.module.weight",
        ];
        let wrappers = Wrappers::of_names(names.into_iter());
        for (path, stripped) in [
            ("model.encoder.module.layers.0.q", "model.encoder.module.layers.0.q"),
            ("module.model.encoder.module.layers.0.q", "model.encoder.module.layers.0.q"),
            ("model.encoder.module.layers.0.module.q", "model.encoder.module.layers.0.q"),
            ("_orig_mod.model.encoder.module.module.layers.0.q", "model.encoder.module.layers.0.q"),
            // Under another leading part.
            ("encoder.module.layers.0.experts", "encoder.module.layers.0.experts"),
            ("top.model.head.module", "top.model.head.module"),
            ("model.module.head", "model.head"),
            ("model.head.weight", "model.head.weight"),
            ("model.module.absent", "model.absent"),
        ] {
            assert_eq!(wrappers.strip(path), stripped, "{path}");
        }
        assert!(Wrappers::of_names(["a.weight"].into_iter()).own.is_none());
    }
}
