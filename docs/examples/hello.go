// SPDX-License-Identifier: Apache-2.0

// A KVM client: a guest in real mode that says hello on a serial port.
//
//	CGO_ENABLED=0 go build hello.go && softkvm exec -- ./hello
package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"
)

// Requests, as linux/kvm.h has them.
const (
	createVM            = 0xAE01
	vcpuMmapSize        = 0xAE04
	createVCPU          = 0xAE41
	setUserMemoryRegion = 0x4020AE46
	run                 = 0xAE80
	setRegs             = 0x4090AE82
	getSregs            = 0x8138AE83
	setSregs            = 0x4138AE84

	exitIO  = 2
	exitHlt = 5
)

const (
	ram    = 0x10000
	entry  = 0x1000
	serial = 0x3F8
)

// mov si, text; mov dx, 0x3F8; again: lodsb; test al, al; jz done; out dx, al; jmp again; done: hlt; text
const guest = "\xBE\x0F\x10\xBA\xF8\x03\xAC\x84\xC0\x74\x03\xEE\xEB\xF8\xF4hello from Go\n\x00"

type memoryRegion struct {
	slot, flags               uint32
	guestPhysAddr, size, addr uint64
}

// rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags
type registers [18]uint64

const (
	rip    = 16
	rflags = 17
)

type segment struct {
	base     uint64
	limit    uint32
	selector uint16
	_        [10]uint8
}

// The code segment comes first; the rest stays as it is.
type specialRegisters struct {
	cs segment
	_  [312 - 24]byte
}

// The beginning of struct kvm_run, up to the exit for I/O.
type runPage struct {
	_          [8]byte
	exitReason uint32
	_          [20]byte
	direction  uint8
	width      uint8
	port       uint16
	count      uint32
	dataOffset uint64
}

func check(err error, what string) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
		os.Exit(1)
	}
}

func request(fd int, number uintptr, argument uintptr, name string) int {
	result, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), number, argument)
	if errno != 0 {
		check(errno, name)
	}
	return int(result)
}

func main() {
	// A vCPU belongs to one thread.
	runtime.LockOSThread()
	kvm, err := syscall.Open("/dev/kvm", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	check(err, "/dev/kvm")
	vm := request(kvm, createVM, 0, "KVM_CREATE_VM")
	memory, err := syscall.Mmap(-1, 0, ram, syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_PRIVATE|syscall.MAP_ANON)
	check(err, "RAM")
	copy(memory[entry:], guest)
	region := memoryRegion{size: ram, addr: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	request(vm, setUserMemoryRegion, uintptr(unsafe.Pointer(&region)), "KVM_SET_USER_MEMORY_REGION")

	vcpu := request(vm, createVCPU, 0, "KVM_CREATE_VCPU")
	size := request(kvm, vcpuMmapSize, 0, "KVM_GET_VCPU_MMAP_SIZE")
	page, err := syscall.Mmap(vcpu, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	check(err, "kvm_run")
	state := (*runPage)(unsafe.Pointer(&page[0]))
	var special specialRegisters
	request(vcpu, getSregs, uintptr(unsafe.Pointer(&special)), "KVM_GET_SREGS")
	special.cs.base, special.cs.selector = 0, 0
	request(vcpu, setSregs, uintptr(unsafe.Pointer(&special)), "KVM_SET_SREGS")
	general := registers{rip: entry, rflags: 2}
	request(vcpu, setRegs, uintptr(unsafe.Pointer(&general)), "KVM_SET_REGS")

	for {
		_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(vcpu), run, 0)
		if errno == syscall.EINTR { // by Go's own signals
			continue
		}
		if errno != 0 {
			check(errno, "KVM_RUN")
		}
		switch {
		case state.exitReason == exitHlt:
			return
		case state.exitReason == exitIO && state.port == serial:
			fmt.Printf("%c", page[state.dataOffset])
		default:
			check(fmt.Errorf("exit %d", state.exitReason), "KVM_RUN")
		}
	}
}
