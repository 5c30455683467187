# SPDX-License-Identifier: Apache-2.0
"""Types of the kernel's variables, as its source declares them.

A kernel's BTF has the types of per-CPU variables and of functions; those of other variables are here, for what scripts
ask for. A name that a kernel hasn't got does no harm. Source: Linux 5.10 to 6.12, the files that define them.
"""

from __future__ import annotations

from typing import Final

#: C declarations without the semicolon, by file.
_DECLARATIONS: Final = {
    "init/init_task.c, kernel/fork.c": (
        "struct task_struct init_task",
        "struct mm_struct init_mm",
        "struct fs_struct init_fs",
        "struct files_struct init_files",
        "struct cred init_cred",
        "int nr_threads",
        "unsigned long total_forks",
    ),
    "init/main.c, init/version.c": (
        "struct uts_namespace init_uts_ns",
        "char * saved_command_line",
        "enum system_states system_state",
        "char [] linux_banner",
    ),
    "kernel/pid.c, kernel/user.c, kernel/nsproxy.c, ipc, cgroup": (
        "struct pid_namespace init_pid_ns",
        "struct user_namespace init_user_ns",
        "struct nsproxy init_nsproxy",
        "struct ipc_namespace init_ipc_ns",
        "struct cgroup_namespace init_cgroup_ns",
        "struct net init_net",
        "struct css_set init_css_set",
        "struct cgroup_root cgrp_dfl_root",
        "struct pid init_struct_pid",
    ),
    "kernel/module, kernel/kallsyms, kernel/printk": (
        "struct list_head modules",
        "struct latch_tree_root mod_tree",
        "struct printk_ringbuffer * prb",
        "int [4] console_printk",
        "struct console * console_drivers",
    ),
    "kernel/time, kernel/sched, kernel/rcu": (
        "unsigned long volatile jiffies",
        "u64 jiffies_64",
        "struct timekeeper shadow_timekeeper",
        "struct rq runqueues",
        "struct task_group root_task_group",
        "struct list_head task_groups",
        "unsigned int sysctl_sched_latency",
        "struct list_head workqueues",
        "unsigned long tainted_mask",
        "int panic_timeout",
        "char * [] task_state_array",
    ),
    "kernel/cpu.c, arch/x86/kernel/setup_percpu.c": (
        "struct cpumask __cpu_possible_mask",
        "struct cpumask __cpu_online_mask",
        "struct cpumask __cpu_present_mask",
        "struct cpumask __cpu_active_mask",
        "unsigned int nr_cpu_ids",
        "unsigned long [8192] __per_cpu_offset",
        "struct cpuinfo_x86 boot_cpu_data",
    ),
    "mm": (
        "struct list_head slab_caches",
        "unsigned long max_pfn",
        "unsigned long min_low_pfn",
        "unsigned long max_low_pfn",
        "atomic_long_t _totalram_pages",
        "atomic_long_t vm_zone_stat",
        "struct pglist_data * [1024] node_data",
        "struct mem_section * * mem_section",
        "struct list_head vmap_area_list",
        "unsigned long vmemmap_base",
        "unsigned long page_offset_base",
        "unsigned long vmalloc_base",
        "unsigned long phys_base",
        "struct page * vmemmap",
        "struct resource iomem_resource",
        "struct resource ioport_resource",
        "struct list_head shrinker_list",
    ),
    "fs, block, drivers": (
        "struct list_head super_blocks",
        "struct file_system_type * file_systems",
        "struct list_head pci_root_buses",
        "struct bus_type pci_bus_type",
        "struct bus_type virtio_bus",
        "struct class block_class",
        "struct kset * devices_kset",
        "struct list_head net_namespace_list",
        "struct list_head hibernate_nosave",
        "struct clocksource * curr_clocksource",
        "struct list_head clocksource_list",
    ),
}


def _table() -> dict[str, str]:
    found = {}
    for declarations in _DECLARATIONS.values():
        for declaration in declarations:
            type, _, name = declaration.rpartition(" ")
            found[name] = type
    return found


#: The type's text by the variable's name.
VARIABLES: Final = _table()
