// SPDX-License-Identifier: Apache-2.0
//! Loads the interpreter and KVM into the process, at the first use.
//!
//! What to load, `softkvm exec` says in the environment; children of the client get the same.

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;

use crate::Core;
use crate::forks::Turn;
use crate::sanitizers::{Unseen, obstacle};

static CORE: AtomicPtr<Core> = AtomicPtr::new(core::ptr::null_mut());
static LOADING: Turn = Turn::new();
static FAILED: AtomicBool = AtomicBool::new(false);

/// The KVM, if it is loaded.
pub fn core() -> Option<&'static Core> {
    // SAFETY: null, or what Python has given, which stays.
    unsafe { CORE.load(Ordering::Acquire).as_ref() }
}

/// Who loads; forks wait for it.
pub fn loading() -> &'static Turn {
    &LOADING
}

/// The KVM, loaded if it is not: `prepare` is done before, and `start_it` lets it begin. None, after one line that says
/// why, if that cannot be.
pub fn load(prepare: impl FnOnce(), start_it: impl FnOnce(&'static Core)) -> Option<&'static Core> {
    if let Some(core) = core() {
        return Some(core);
    }
    let _quiet = Quiet::new();
    let _unseen = Unseen::new();
    let _turn = LOADING.take()?;
    if FAILED.load(Ordering::Relaxed) || core().is_some() {
        return core();
    }
    prepare();
    let loaded = start();
    match loaded {
        Ok(core) => {
            start_it(core);
            CORE.store(core::ptr::from_ref(core).cast_mut(), Ordering::Release);
        }
        Err(why) => {
            eprintln!("softkvm: {why}");
            FAILED.store(true, Ordering::Relaxed);
        }
    }
    core()
}

/// What has to be as the client has it: its signals' mask, that no handler runs meanwhile, and its locale.
struct Quiet {
    mask: libc::sigset_t,
    locale: Option<CString>,
}

impl Quiet {
    fn new() -> Quiet {
        // SAFETY: valid pointers; the name of the locale is copied.
        unsafe {
            let mut all = MaybeUninit::uninit();
            let mut mask = MaybeUninit::uninit();
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), mask.as_mut_ptr());
            let name = libc::setlocale(libc::LC_CTYPE, core::ptr::null());
            let locale = (!name.is_null()).then(|| CStr::from_ptr(name).to_owned());
            Quiet { mask: mask.assume_init(), locale }
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // SAFETY: valid pointers.
        unsafe {
            if let Some(locale) = &self.locale {
                libc::setlocale(libc::LC_CTYPE, locale.as_ptr());
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.mask, core::ptr::null_mut());
        }
    }
}

fn setting(name: &str) -> Result<CString, String> {
    use std::os::unix::ffi::OsStringExt;
    let value = std::env::var_os(name).ok_or_else(|| format!("{name} is not set: use `softkvm exec`"))?;
    CString::new(value.into_vec()).map_err(|_| format!("{name} has a null byte in it"))
}

/// Functions of the interpreter: those of its stable interface, and those that make it.
struct Interpreter(*mut c_void);

macro_rules! python {
    ($interpreter:ident.$name:ident($($value:expr => $type:ty),*) -> $result:ty) => {{
        let function = $interpreter.find(concat!(stringify!($name), "\0"))?;
        // SAFETY: the function of this name has this type.
        unsafe { core::mem::transmute::<*mut c_void, extern "C" fn($($type),*) -> $result>(function)($($value),*) }
    }};
}

fn dl_error() -> String {
    // SAFETY: null or a string.
    unsafe {
        let error = libc::dlerror();
        if error.is_null() { "unknown".into() } else { CStr::from_ptr(error).to_string_lossy().into_owned() }
    }
}

impl Interpreter {
    fn symbol(&self, name: &str) -> *mut c_void {
        debug_assert!(name.ends_with('\0'));
        // SAFETY: ends with a null byte.
        unsafe { libc::dlsym(self.0, name.as_ptr().cast()) }
    }

    fn find(&self, name: &str) -> Result<*mut c_void, String> {
        let found = self.symbol(name);
        if found.is_null() {
            Err(format!("the Python library lacks {}", name.trim_end_matches('\0')))
        } else {
            Ok(found)
        }
    }

    /// Sets one of the interpreter's global variables, where it still has it.
    fn set_flag(&self, name: &str) {
        let flag = self.symbol(name).cast::<c_int>();
        if !flag.is_null() {
            // SAFETY: an int of the interpreter's.
            unsafe { *flag = 1 };
        }
    }
}

/// Makes an interpreter that leaves the process's signals alone, imports no `site` and reads no environment.
fn initialize(python: &Interpreter, executable: &CStr) -> Result<(), String> {
    for flag in ["Py_IgnoreEnvironmentFlag\0", "Py_NoSiteFlag\0", "Py_NoUserSiteDirectory\0"] {
        python.set_flag(flag);
    }
    if !python.symbol("PyInitConfig_Create\0").is_null() {
        let config = python!(python.PyInitConfig_Create() -> *mut c_void);
        for (name, value) in
            [("site_import\0", 0), ("use_environment\0", 0), ("install_signal_handlers\0", 0)]
        {
            python!(python.PyInitConfig_SetInt(config => *mut c_void, name.as_ptr().cast() => *const c_char, value => i64) -> c_int);
        }
        python!(python.PyInitConfig_SetStr(config => *mut c_void, c"executable".as_ptr() => *const c_char, executable.as_ptr() => *const c_char) -> c_int);
        let status = python!(python.Py_InitializeFromInitConfig(config => *mut c_void) -> c_int);
        python!(python.PyInitConfig_Free(config => *mut c_void) -> ());
        return if status == 0 { Ok(()) } else { Err("the Python interpreter does not start".into()) };
    }
    let name = python!(python.Py_DecodeLocale(executable.as_ptr() => *const c_char, core::ptr::null_mut() => *mut usize) -> *mut c_void);
    // It keeps the name.
    python!(python.Py_SetProgramName(name => *mut c_void) -> ());
    python!(python.Py_InitializeEx(0 => c_int) -> ());
    Ok(())
}

/// The first version that KVM is written for.
const VERSION: (u32, u32) = (3, 11);

/// Refuses a client whose own interpreter is too old.
fn check_version(python: &Interpreter) -> Result<(), String> {
    let text = python!(python.Py_GetVersion() -> *const c_char);
    // SAFETY: a string that the interpreter keeps.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let version = text.split_whitespace().next().unwrap_or_default();
    let mut numbers = version.split('.').map_while(|part| part.parse::<u32>().ok());
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if (major, minor) < VERSION {
        return Err(format!("the client is Python {version}, expected {}.{} or later", VERSION.0, VERSION.1));
    }
    Ok(())
}

fn start() -> Result<&'static Core, String> {
    if let Some(why) = obstacle() {
        return Err(why.into());
    }
    let (library, executable) = (setting("SOFTKVM_LIBPYTHON")?, setting("SOFTKVM_PYTHON")?);
    let script = setting("SOFTKVM_WORLD")?;
    // The client may be Python, linked to the library or with the interpreter in itself.
    let mut python = Interpreter(libc::RTLD_DEFAULT);
    let is_client =
        !python.symbol("Py_IsInitialized\0").is_null() && python!(python.Py_IsInitialized() -> c_int) != 0;
    if !is_client {
        // SAFETY: loads a library; global, for the extension modules.
        python = Interpreter(unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) });
        if python.0.is_null() {
            return Err(dl_error());
        }
        initialize(&python, &executable)?;
    }
    if is_client {
        check_version(&python)?;
    }
    if is_client {
        LOADING.let_forks_pass();
    }
    let state = python!(python.PyGILState_Ensure() -> c_int);
    let core = world(&python, &script);
    python!(python.PyGILState_Release(state => c_int) -> ());
    if is_client && let Ok(core) = core {
        (core.client_is_python)();
    }
    // The thread that has made the interpreter holds its lock from then on.
    if python!(python.PyGILState_Check() -> c_int) != 0 {
        python!(python.PyEval_SaveThread() -> *mut c_void);
    }
    core
}

/// Runs the script that makes the world, which leaves the core's address in its variable `core`, or a line in `why`.
fn world(python: &Interpreter, script: &CStr) -> Result<&'static Core, String> {
    const FILE_INPUT: c_int = 257;
    let globals = python!(python.PyDict_New() -> *mut c_void);
    let code = python!(python.Py_CompileString(script.as_ptr() => *const c_char, c"SOFTKVM_WORLD".as_ptr() => *const c_char, FILE_INPUT => c_int) -> *mut c_void);
    let result = if code.is_null() {
        core::ptr::null_mut()
    } else {
        python!(python.PyEval_EvalCode(code => *mut c_void, globals => *mut c_void, globals => *mut c_void) -> *mut c_void)
    };
    if result.is_null() {
        python!(python.PyErr_Print() -> ());
        return Err("KVM could not be loaded".into());
    }
    let variable = |name: &CStr| {
        Ok::<_, String>(
            python!(python.PyDict_GetItemString(globals => *mut c_void, name.as_ptr() => *const c_char) -> *mut c_void),
        )
    };
    let why = variable(c"why")?;
    if !why.is_null() {
        let text = python!(python.PyUnicode_AsUTF8AndSize(why => *mut c_void, core::ptr::null_mut() => *mut isize) -> *const c_char);
        // SAFETY: null, or a string that is there as long as the dictionary is.
        let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy());
        return Err(format!("KVM could not be loaded: {}", text.unwrap_or("unknown".into())));
    }
    let address = variable(c"core")?;
    let address = python!(python.PyLong_AsSize_t(address => *mut c_void) -> usize) as *const Core;
    // SAFETY: the address of the extension module's functions, which stay; null is the script's fault.
    unsafe { address.as_ref() }.ok_or_else(|| "SOFTKVM_WORLD has no core".into())
}
